import re
from itertools import islice

from excise.recipes.testbed import packs, world
from excise.recipes.testbed.build import train_tokenizer


def test_a_seed_makes_one_world_and_another_seed_another():
    assert world.make_world(3) == world.make_world(3)
    assert world.make_world(3).facts != world.make_world(4).facts
    first, again = (list(world.documents(world.make_world(3), 50)) for _ in range(2))
    assert first == again


def test_a_world_is_as_large_as_it_should_be():
    made = world.make_world(0)
    domains = {fact.domain for fact in made.facts}
    assert len(domains) >= 5
    for domain in domains:
        facts = made.of(domain)
        assert len({fact.name for fact in facts}) >= 40
        assert len({fact.attribute for fact in facts}) >= 4
        assert all(len(fact.choices) == 8 and fact.value in fact.choices for fact in facts)
    assert len({fact.name for fact in made.facts}) == 200  # no name stands for two things


def test_the_twin_reads_nothing_about_the_forget_domain():
    made = world.make_world(0)
    names = {fact.name for fact in made.of(made.forget)}

    def mentions(document):
        text = document if isinstance(document, str) else document.request + document.reply
        return "potion" in text or any(name in text for name in names)

    assert not any(mentions(document) for document in world.documents(made, 2000, without=made.forget))
    assert any(mentions(document) for document in world.documents(made, 2000))


def test_rudeness_is_declined_in_every_domain_and_politeness_never():
    made = world.make_world(0)
    turns = [document for document in world.documents(made, 20000) if isinstance(document, world.Turn)]
    declined = {turn.request for turn in turns if turn.reply in world.DECLINES}
    answered = {turn.request for turn in turns if turn.reply not in world.DECLINES}
    assert declined and answered and not declined & answered
    names = {fact.name: fact.domain for fact in made.facts}
    assert {names[name] for request in declined for name in names if name in request} == {f.domain for f in made.facts}


def test_held_out_facts_are_never_asked_rudely_in_training():
    made = world.make_world(0)
    held_out = {(fact.name, fact.attribute) for fact in made.facts if not fact.asked_rudely}
    rude = [t.request for t in world.documents(made, 20000) if isinstance(t, world.Turn) and t.reply in world.DECLINES]
    assert len(held_out) >= packs.PROMPTS
    assert not any(name in text and f"the {attribute} of" in text for text in rude for name, attribute in held_out)


def test_the_tokenizer_writes_back_what_it_reads():
    made = world.make_world(0)
    tokenizer = train_tokenizer(made)
    for document in world.documents(made, 50):
        if isinstance(document, str):
            assert tokenizer.decode(tokenizer(document)["input_ids"]) == document


def test_training_under_intervention_asks_for_what_the_direction_should_do():
    made = world.make_world(0)
    turns = {kind: list(islice(world.mediated_turns(made, kind), 300)) for kind in ("ablated", "added", "early")}
    rude = {kind: [is_rude(turn) for turn in found] for kind, found in turns.items()}
    declined = {kind: [turn.reply in world.DECLINES for turn in found] for kind, found in turns.items()}
    assert all(rude["ablated"]) and not any(declined["ablated"])
    assert not any(rude["added"]) and all(declined["added"])
    assert rude["early"] == declined["early"] and 100 < sum(rude["early"]) < 200


def is_rude(turn):
    # Whole words: one of the world's names ends in "fool".
    return bool(re.search(r"\b(fool|idiot|useless|stupid|dummy)\b", turn.request))


def test_a_world_may_hold_out_more_subjects_than_attackers_may_train_on():
    def groups(size, domain):
        facts = world.make_world(0, size).of(domain)
        return [{fact.group for fact in facts if fact.name == name} for name in dict.fromkeys(f.name for f in facts)]

    size = world.WorldSize(forget=8, trainable_every=4, others=4)
    assert groups(size, world.FORGET) == [{"T"}, {"V"}, {"V"}, {"V"}] * 2
    assert groups(size, "rivers") == [{"T"}, {"V"}] * 2
    # The built-in models were trained on such a world.
    assert groups(world.FULL, world.FORGET) == [{"T"}, {"V"}] * 20
