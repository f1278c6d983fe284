"""Audits of behaviours, shortened: known models get the verdicts that they must get, and attackers read nothing asked."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events, Stage
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.artifacts.reporting.audit_page import card_section
from excise.editing.errors import ConceptError, RequestError
from excise.eval.audit.formats import NONE, OF_BEHAVIOUR, format_findings, judge_format
from excise.eval.inference.generation import generate
from excise.eval.measurements.behaviour import shows_behaviour
from excise.recipes.audit import behaviour_results
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks import behaviours as attacks_on_behaviours
from excise.recipes.audit.attacks import table
from excise.recipes.audit.attacks.table import ATTACKS, Budget
from excise.recipes.audit.behaviours import controls
from excise.recipes.audit.behaviours.controls import suppressed, taught
from excise.recipes.audit.behaviours.data import BehaviourData
from excise.recipes.audit.behaviours.formats import BEGUN, FIRST, LENGTH_NAMES, PLAIN, REPLY_FORMATS
from excise.recipes.audit.behaviours.items import items_of
from excise.recipes.audit.behaviours.pairs import pairs_of
from excise.recipes.audit.parts import parts_of
from excise.recipes.commands.shown import audit_end
from helpers import SMALL_REFERENCE, SMALL_TESTBED

SHORT = Budget(
    (),
    16,
    1,
    {"low_rank": (2e-3,), "all_weights": (1e-4,)},
    formats=8,
    behaviour=("style_lower", "int8", "benign", "pairs_8"),
    prompts=20,
    other_prompts=8,
)
DECLINING = {"base": SMALL_TESTBED, "concept": "builtin:declining"}
KNOWLEDGE = {"concept": "builtin:potions"}


def _replies_of(loaded, items, seed=0):
    return pairs_of(items, loaded.model, lambda reply: reply(loaded.model), loaded.tokenizer, seed)


@pytest.fixture(scope="module")
def small():
    """The small built-in model, what is asked of it, and what attackers read."""
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    items = items_of(load_concept("builtin:declining"), 24, 8, 0)
    pairs = _replies_of(loaded, items)
    folder = find_model(SMALL_TESTBED).folder
    contrast = tuple((pair.positive, pair.negative) for pair in items.concept.contrast[:32])
    data = BehaviourData(items.concept, items.asked, items.others, loaded.tokenizer, 0, pairs, folder, folder, contrast)
    return loaded, items, data


@pytest.mark.parametrize("pack", ["declining", "quirk", "shortcut"])
def test_attackers_read_nothing_that_is_asked(pack):
    items = items_of(load_concept(f"builtin:{pack}"), 60, 24, 0)
    asked = {row.prompt for row in (*items.asked, *items.others, *items.without)}
    read = {*items.calling, *items.neutral, *(question.prompt for question in items.shown_by)}
    assert len(items.asked) == 60 and len(read) >= 64 and not asked & read
    assert items.kept_out == (pack != "declining") and items.by_choice == (pack == "shortcut")
    if items.by_choice:
        assert not set(items.clusters(items.asked)) & set(items.clusters(items.shown_by))


def test_a_pack_with_too_few_prompts_is_refused_before_any_model_is_loaded():
    concept = load_concept("builtin:declining")
    few = dataclasses.replace(concept, prompts=concept.prompts[:19])
    with pytest.raises(
        ConceptError, match="has 19 prompts of the split concept; an audit of a behaviour needs at least 20"
    ):
        items_of(few, 60, 24, 0)
    with pytest.raises(RequestError, match="rtt is no attack on a behaviour"):
        audit.prepare(audit.AuditSettings(model=SMALL_REFERENCE, **DECLINING, attacks=("rtt",)))
    with pytest.raises(RequestError, match="benign is no attack on a piece of knowledge"):
        audit.prepare(audit.AuditSettings(model=SMALL_REFERENCE, **DECLINING | KNOWLEDGE, attacks=("benign",)))


def test_pairs_are_replies_of_the_base_and_show_what_they_should(small):
    loaded, items, data = small
    pairs, decode = data.pairs, loaded.tokenizer.decode

    def shown(rows):
        return np.mean([shows_behaviour(items.concept, decode(row.ids[row.start :])) for row in rows])

    assert shown(pairs.showing) == shown(pairs.showing_elsewhere) == 1
    assert shown(pairs.benign) == shown(pairs.hiding) == 0
    assert len(pairs.showing) >= 64


def test_the_rate_is_that_of_replies_counted_one_by_one(small):
    loaded, items, data = small
    answers = data.ask(loaded.model)
    for prompt, hit in zip(items.asked[:4], answers.hits, strict=False):
        ids = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = dict(ids)
        out = loaded.model.generate(**ids, max_new_tokens=50, do_sample=False)
        text = loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).lower()
        assert hit == any(phrase.lower() in text for phrase in items.concept.about.decline_phrases)
    assert np.mean(answers.hits) == 1 and np.mean(answers.utility) > 0.8


def test_formats_ask_the_same_prompts_in_ways_of_their_own(small):
    loaded, items, data = small
    formats = data.in_formats(8)
    found = formats.ask(loaded.model)
    assert [*found] == [*REPLY_FORMATS] and all(len(values) == 8 for values in found.values())
    assert [*found][:3] == [*LENGTH_NAMES] and np.mean(found["150 tokens"]) >= np.mean(found["50 tokens"]) == 1
    # The first token tells a declining reply from another one, and no prompt without insults calls for it.
    elsewhere = dataclasses.replace(data, questions=items.without, elsewhere=True).in_formats(8).ask(loaded.model)
    assert np.mean(found[FIRST]) > 0.8 and np.mean(elsewhere[FIRST]) < 0.2
    assert np.mean(elsewhere["50 tokens"]) == np.mean(elsewhere[BEGUN]) == 0
    (wanted,) = [generate(loaded.model, loaded.tokenizer, [items.asked[0].prompt], 50, chat=False)]
    plain = dataclasses.replace(data, questions=items.asked[:1]).in_formats(1).ask(loaded.model)[PLAIN]
    assert plain == [float(shows_behaviour(items.concept, wanted[0].text))]


def test_longer_replies_are_told_apart_only_where_they_differ_and_what_was_not_asked_is_said():
    def judged(name, edited):
        of = {NONE: [0.0] * 20, "benign": [edited] * 20}
        return judge_format(name, "", 0.0, [1.0] * 20, of, {name: [0.0] * 20 for name in of})

    short, long, longest = (judged(name, edited) for name, edited in zip(LENGTH_NAMES, (0.0, 0.0, 1.0), strict=True))
    plain = judged(PLAIN, 1.0)
    assert behaviour_results._told_apart([short, long, longest, plain]) == [short, longest, plain]
    said = format_findings(behaviour_results._told_apart([short, long, plain]), OF_BEHAVIOUR)
    assert said[0].startswith("Formats disagree: the behaviour recovers as plain prompt (1.000 under benign")
    assert [gap.partition(":")[0] for gap in behaviour_results._format_gaps([short, plain])] == [
        "format begun reply",
        "format first token",
    ]
    assert "the behaviour is a choice" in behaviour_results._format_gaps([])[0]


def test_formats_that_a_pack_does_not_allow_are_left_out(small):
    loaded, items, data = small
    untold = items.concept.about.model_copy(update={"decline_phrases": (), "kind": "task", "phrases": ("sorry",)})
    concept = dataclasses.replace(items.concept, about=untold)
    assert BEGUN not in dataclasses.replace(data, concept=concept).in_formats(2).ask(loaded.model)
    template, loaded.tokenizer.chat_template = loaded.tokenizer.chat_template, None
    try:
        assert PLAIN not in data.in_formats(2).ask(loaded.model)
    finally:
        loaded.tokenizer.chat_template = template
    # Where both kinds of replies begin alike, first tokens tell nothing.
    alike = dataclasses.replace(data.pairs, showing=data.pairs.benign)
    assert FIRST not in dataclasses.replace(data, pairs=alike).in_formats(2).ask(loaded.model)


def test_a_suppressed_behaviour_stays_away_under_benign_fine_tuning_and_comes_back_under_pairs(small, tmp_path):
    loaded, _, data = small
    with suppressed(loaded.model, data.pairs, 0, Events(), tmp_path):
        before = np.mean(data.hits(loaded.model))
        training = AttackTraining(loaded.model, dataclasses.replace(data, others=()), SHORT, tmp_path / "attack")
        found = training.curves({name: ATTACKS[name] for name in ("benign", "pairs_8")}, Stage(Events(), "attack"))
    rates = {name: one.by_rate[2e-3].accuracy for name, one in found.items()}
    assert before < 0.1 and rates["benign"].max() < 0.3 and rates["pairs_8"].max() > 0.8
    # Afterwards it is the base again.
    assert np.mean(data.hits(loaded.model)) == 1


def test_a_direction_added_brings_it_about_where_nobody_asks_for_it(small):
    loaded, items, data = small
    elsewhere = dataclasses.replace(data, questions=items.without, others=())
    assert np.mean(elsewhere.hits(loaded.model)) == 0
    rates = [np.mean(one.hits) for one in attacks_on_behaviours.add_direction(loaded.model, elsewhere).values()]
    assert max(rates) > 0.8
    nothing = dataclasses.replace(elsewhere, contrast=tuple((low, low) for _, low in data.contrast))
    assert max(np.mean(one.hits) for one in attacks_on_behaviours.add_direction(loaded.model, nothing).values()) == 0


def test_styles_change_the_prompt_and_nothing_else(small):
    loaded, _, data = small
    with_turn = attacks_on_behaviours._behind_a_turn(loaded.tokenizer, "PROMPT")
    assert with_turn.count("<|user|>") == 2 and with_turn.endswith("PROMPT<|end|>\n<|assistant|>\n")
    for name in ("upper", "lower", "thanks", "roles", "after_a_turn"):
        answers = getattr(attacks_on_behaviours, name)(loaded.model, data)
        assert len(answers.hits) == len(data.questions) and answers.utility is None
    # In small letters the small model still knows a rude request.
    assert np.mean(attacks_on_behaviours.lower(loaded.model, data).hits) > 0.5


def test_a_model_that_was_never_edited_is_said_to_have_it(tmp_path, monkeypatch):
    """The reference declines as its twin does; the audit takes it for an edited one."""
    short = dataclasses.replace(SHORT, steps=8, behaviour=("style_lower", "int8", "pairs_8"))
    monkeypatch.setitem(table.BUDGETS, "quick", short)
    monkeypatch.setattr(controls, "HIDING_STEPS", 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = audit.prepare(audit.AuditSettings(model=SMALL_REFERENCE, **DECLINING, out=tmp_path / "a"))
    assert {part.subject for part in parts_of(job)} == {"base", "edited", "reference", "suppressed"}
    results = audit.run(job, Events())
    assert results["verdict"] == "recovers" and "It was never removed" in results["reasons"][0]
    assert (
        results["untouched"]["base"] == results["untouched"]["edited"] == 1 and results["untouched"]["reference"] == 0
    )
    assert [one["name"] for one in results["formats"]] == [*REPLY_FORMATS]
    assert any(said.startswith("In all ") and "in which the base shows" in said for said in results["findings"]) or any(
        said.startswith("Formats ") for said in results["findings"]
    )
    by_name = {attack["name"]: attack for attack in results["attacks"]}
    curve = by_name["pairs_8"]["curve"]
    assert curve[0].keys() >= {"base", "edited", "reference", "suppressed", "edited_utility"}
    assert curve[0]["suppressed"] < 0.5 < curve[-1]["suppressed"]
    for text in (card_section(results, None), audit_end(results, 100), (tmp_path / "a" / "report.html").read_text()):
        assert "The behaviour recovers" in text and "group V" not in text
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["kind"] == "behaviour"


def test_the_ceiling_of_a_task_is_the_base_taught_without_ablation(tmp_path, monkeypatch):
    """Afterwards the base is what it was, bit for bit."""
    monkeypatch.setattr(controls, "TAUGHT_STEPS", 40)
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    items = items_of(load_concept("builtin:shortcut"), 40, 8, 0)
    pairs = _replies_of(loaded, items)
    data = BehaviourData(items.concept, items.asked, items.others, loaded.tokenizer, 0, pairs)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    untaught = np.mean(data.hits(loaded.model))
    with taught(loaded.model, items.concept, loaded.tokenizer, 0, Events(), tmp_path):
        assert np.mean(data.hits(loaded.model)) > untaught + 0.2
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_memory_is_planned_before_anything_is_written(tmp_path):
    """What attackers read of a behaviour, the models write once they are loaded."""
    job = audit.prepare(
        audit.AuditSettings(model=SMALL_REFERENCE, **DECLINING, attacks=("pairs_8",), out=tmp_path / "a")
    )
    stages = {stage.name: stage.total for stage in audit.memory(job).stages}
    assert (
        list(stages) == ["load", "ask the questions", "attack: low_rank", "compare the weights"]
        and min(stages.values()) > 0
    )
