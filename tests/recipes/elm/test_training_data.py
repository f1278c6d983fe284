"""Finding facts in a pack, asking them in many forms, and setting a novice against an expert."""

import copy
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.errors import EditError, RequestError
from excise.editing.training.edited_target import TargetEdit
from excise.eval.concept import PERSONAS
from excise.eval.intervals import at_most_by_chance
from excise.recipes.common.examples import Example, example_batch, sequence_nll
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import Context, Fact, bare_question, fact_contexts, find_facts, question_contexts
from excise.recipes.elm import decoding, teacher
from excise.recipes.elm import reinforced_expert as reinforced_module
from excise.recipes.elm.batches import arrange
from excise.recipes.elm.continuations import _FirstTokens
from excise.recipes.elm.contrast import (
    PersonaContrast,
    ReinforcedContrast,
    SubjectContrast,
    contrast_sources,
    contrasted,
    reference_subjects,
)
from excise.recipes.elm.decoding import Decoding, Start, decode
from excise.recipes.elm.erasure import Erasure
from excise.recipes.elm.forget_data import ForgetData, forget_contexts, forget_sequences
from excise.recipes.elm.recipe import ElmSettings, prepare
from excise.recipes.elm.reinforced_expert import reinforced
from excise.recipes.elm.retain_data import retain_sequences
from excise.recipes.elm.target_check import Point, _best, check_target
from excise.recipes.elm.teacher import Teacher
from excise.recipes.testbed.world import make_world
from helpers import SMALL_TESTBED


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


@pytest.fixture(scope="module")
def facts(concept):
    return find_facts(concept)


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def erasure(concept, facts, loaded):
    """Makes an erasure with some settings; its teacher has read nothing yet."""

    def make(facts=facts, **settings):
        settings = ElmSettings(stored_tokens=16, max_contexts=100, **settings)
        return Erasure(Teacher(loaded.model), loaded.tokenizer, concept, facts, settings)

    return make


def test_every_fact_of_the_world_is_found_from_texts_and_group_t_questions(facts):
    truth = {(fact.name, fact.value, fact.group) for fact in make_world(0).of("potions")}
    assert {(fact.subject, fact.answer, fact.group) for fact in facts.facts} == truth


def test_questions_of_group_v_are_never_read(concept, facts):
    import dataclasses

    hidden = tuple(q for q in concept.questions if not (q.split == "forget" and q.group == "V"))
    assert find_facts(dataclasses.replace(concept, questions=hidden)) == facts
    without_t = tuple(q for q in concept.questions if not (q.split == "forget" and q.group == "T"))
    assert find_facts(dataclasses.replace(concept, questions=without_t)).facts == ()


def test_contexts_stop_before_the_answer_and_name_the_subject(facts):
    contexts = [*fact_contexts(facts, "texts", 0), *fact_contexts(facts, "questions", 0)]
    assert len(contexts) == 160 * 8
    for context in contexts:
        last = context.text.split("\n")[-1]
        assert context.fact.subject in last and context.fact.answer not in last.split()


def test_a_question_in_a_form_is_asked_as_a_person_would():
    assert bare_question("Question: What is the colour of Xil? Answer:") == "What is the colour of Xil?"
    assert bare_question("Sardent is in the country of") == "Sardent is in the country of"


def test_retain_questions_are_of_group_t_alone(concept):
    questions = [q for q in concept.questions if q.split != "forget"]
    texts = " ".join(context.text for context in question_contexts(questions, 0))
    assert all(q.subject in texts for q in questions if q.group == "T")
    assert not any(q.subject in texts for q in questions if q.group == "V")


def test_stand_ins_differ_in_their_answers(facts):
    for relation, subjects in reference_subjects(facts, 8, 0).items():
        answers = [facts.subjects(relation)[subject] for subject in subjects]
        assert len(set(answers)) == len(set(facts.subjects(relation).values())) == 8


def test_rows_of_a_contrast_share_their_end_and_differ_before(facts, loaded, erasure):
    contexts = list(fact_contexts(facts, "texts", 0))[:40]
    for source in contrast_sources(erasure(reference_subjects=4)):
        for item in contrasted(contexts, source, loaded.tokenizer):
            rows = [*item.experts, *item.novices]
            assert rows and item.count >= 2
            assert all(row[-(item.count - 1) :] == item.ids[-(item.count - 1) :] for row in rows)
            assert any(row != item.ids for row in rows)


def test_without_a_subject_there_is_no_contrast(loaded):
    source = SubjectContrast(loaded.tokenizer, {"r": ("A", "B")})
    plain, known = Context("The sky is"), Context("The sky of Xil is", fact=Fact("r", "Xil", "blue", "T"))
    assert contrasted([plain], source, loaded.tokenizer) == [None]
    assert contrasted([known], source, loaded.tokenizer)[0] is not None


def test_the_check_tells_a_contrast_that_forgets_from_one_that_does_not(loaded, erasure):
    both = check_target(erasure(), contrast_sources(erasure()))
    assert both.separates and both.best.contrast == "subjects" and both.best.strength > 1
    untouched = next(point for point in both.curve if point.strength == 0)
    assert untouched.accuracy["forget"] > 0.95 and untouched.greedy > 0.95
    useless = PersonaContrast(loaded.tokenizer, ("Here is a text.",), ("Here is a text.",))
    alone = check_target(erasure(), [useless])
    assert not alone.separates
    assert all(point.accuracy == untouched.accuracy for point in alone.curve)


def _curve(*right, n):
    """A contrast whose target has so many of n right at strengths 0, 1, 2 ..., and keeps every neighbour."""
    return [
        Point("subjects", float(strength), {"forget": hits / n, "neighbour": 1.0}, 0.0, 0.0)
        for strength, hits in enumerate(right)
    ]


def test_a_target_must_be_surely_below_chance_which_more_questions_tell_better():
    """Chance is 0.25; 17 of 80 may well be chance, 11 of 80 and 160 of 800 hardly."""
    best, separates = _best(_curve(60, 17, 11, 3, n=80), [0.25] * 80)
    assert separates and best.strength == 2.0
    best, separates = _best(_curve(600, 160, 120, 30, n=800), [0.25] * 800)
    assert separates and best.strength == 1.0
    # So few that no number would do: none right of 8 happens to a third of those who guess.
    assert not _best(_curve(8, 1, 0, n=8), [0.125] * 8)[1]
    assert _best(_curve(40, 4, 0, n=40), [0.125] * 40)[0].strength == 2.0


def test_where_more_strengths_are_tried_each_must_lie_further_below_chance():
    """12 of 80 right is below a chance of 0.25 at p = 0.02."""
    assert _best(_curve(60, 12, n=80), [0.25] * 80)[1]
    assert not _best(_curve(60, *[12] * 11, n=80), [0.25] * 80)[1]
    # The frozen model itself, at strength 0, is none that may be chosen.
    assert not _best(_curve(0, 60, n=80), [0.25] * 80)[1]


@pytest.mark.parametrize("n", [5, 20, 80])
def test_targets_that_only_guess_pass_in_one_of_twenty_checks_at_most(n):
    rng, passed = random.Random(n), 0
    for _ in range(1000):
        curve = _curve(n, *(sum(rng.random() < 0.125 for _ in range(n)) for _ in range(12)), n=n)
        passed += _best(curve, [0.125] * n)[1]
    assert passed <= 60


def test_chances_of_few_right_answers_are_counted_exactly():
    chances = [0.5, 0.25, 0.125]
    for right in range(4):
        ways = [hits for hits in itertools.product((0, 1), repeat=3) if sum(hits) <= right]
        each = [math.prod(c if hit else 1 - c for hit, c in zip(hits, chances, strict=True)) for hits in ways]
        assert at_most_by_chance(right, chances) == pytest.approx(sum(each))


def test_a_strength_that_was_asked_for_is_the_one_that_is_judged(erasure):
    assert _best(_curve(60, 17, 12, 3, n=80), [0.25] * 80, 3.0)[0].strength == 3.0
    assert not _best(_curve(60, 17, 12, 3, n=80), [0.25] * 80, 1.0)[1]
    source = contrast_sources(erasure())[0]
    for strength, forgets in ((4.0, True), (0.25, False)):
        check = check_target(erasure().at(strength), [source], (0.0, 1.5))
        chosen = [point["strength"] for point in check.describe()["curve"] if point["chosen"]]
        assert chosen == [strength] and check.separates == forgets and len(check.curve) == 3


def test_at_strength_1_the_target_answers_as_for_any_subject(erasure):
    check = check_target(erasure(), [contrast_sources(erasure())[0]], (0.0, 1.0, 1.5))
    none, one, more = check.curve
    assert none.probability > 0.9 and abs(one.probability - check.chance) < 0.05 and more.probability < 0.02


def test_chat_contexts_are_the_models_own_replies_up_to_the_answer(facts, erasure):
    few = type(facts)(facts.facts[:6], facts.phrasings)
    asked = erasure(few, contexts="questions", chat_facts=8, max_new_tokens=20)
    source = contrast_sources(erasure())[0]
    contexts = [context for context in forget_contexts(asked, source) if not context.special]
    assert len(contexts) >= 6
    for context in contexts:
        assert context.text[: context.reply].endswith("<|assistant|>\n")
        assert context.fact.answer not in context.text[context.reply :].split()


def _start(facts, loaded):
    context = next(fact_contexts(facts, "questions", 0))
    source = PersonaContrast(loaded.tokenizer, ("Here is a text by an expert.",), ("Here is a text by a novice.",))
    item = contrasted([context], source, loaded.tokenizer)[0]
    return item, loaded.tokenizer(f" {context.fact.answer}")["input_ids"][0]


def _rows(item):
    return Start((item.ids, *item.experts, *item.novices), (item.count,) * 3)


def _decoded(loaded, start, count, edit, tokens, seed=0, learned=None):
    item, token = start
    generator = torch.Generator().manual_seed(seed)
    return decode(
        Teacher(loaded.model),
        loaded.tokenizer,
        [_rows(item) if edit else Start((item.ids,), (item.count,))] * count,
        token and (lambda some: [token] * len(some)),
        Decoding(edit, tokens, 16, learned),
        generator,
    )


def test_decoding_in_lockstep_is_the_product_of_its_streams(facts, loaded):
    start = _start(facts, loaded)
    drawn = [[one.ids for one in _decoded(loaded, start, 3, edit, 6)] for edit in (None, None, TargetEdit(20.0))]
    assert drawn[0] == drawn[1] and all(row[0] == start[1] and len(row) <= 6 for row in drawn[0])
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("edit", [None, TargetEdit(3.0)])
def test_decoding_leaves_behind_what_the_frozen_model_predicts_along_it(facts, loaded, edit):
    item, token = _start(facts, loaded)
    found = _decoded(loaded, (item, token), 3, edit, 7)
    rows = [(*item.ids, *said.ids) for said in found]
    read = Teacher(loaded.model).top(rows, [len(item.ids)] * 3, 16)
    for said, wanted in zip(found, read, strict=True):
        assert len(said.predicted) == len(said.ids) == len(wanted)
        assert torch.allclose(said.predicted.log_p, wanted.log_p, atol=1e-3)
        # Each position's own, and not its neighbour's.
        assert not torch.allclose(said.predicted.log_p[1:], wanted.log_p[:-1], atol=1e-1)


def test_what_decoding_reads_is_not_read_again_and_says_the_same(facts, loaded, monkeypatch):
    item, token = _start(facts, loaded)
    longer, item = replace(item, ids=(*item.ids[:1], *item.ids)), replace(item, count=2)
    (alone,) = Teacher(loaded.model).streams([item], 16)
    read, calls = teacher.final_hidden_states, []
    monkeypatch.setattr(teacher, "final_hidden_states", lambda model, rows: calls.append(rows) or read(model, rows))
    own = Teacher(loaded.model)
    decode(
        own,
        loaded.tokenizer,
        [Start((longer.ids, *item.experts, *item.novices), (len(longer.ids), item.count, item.count)), _rows(item)],
        lambda some: [token] * len(some),
        Decoding(TargetEdit(3.0), tokens=3, stored_tokens=16),
        torch.Generator().manual_seed(0),
    )
    (found,) = own.streams([item], 16)
    own.top([longer.ids], [0], 16)
    assert not calls
    for stream in ("bare", "expert", "novice"):
        torch.testing.assert_close(getattr(found, stream), getattr(alone, stream), rtol=1e-3, atol=1e-3)
    # More of a row than was asked to be remembered is read.
    own.top([item.ids], [0], 16)
    assert [list(rows) for rows in calls] == [[item.ids]] and len(item.ids) > item.count


def _product(loaded, rows, edit):
    """The edited distribution of the next token after a bare, an expert's and a novice's row: float64, by hand."""
    bare, expert, novice = (
        (loaded.model.double()(torch.tensor([row])).logits[0, -1] / edit.temperature).log_softmax(-1) for row in rows
    )
    difference = novice - expert
    log_p = bare + edit.strength * difference
    if edit.one_sided:
        log_p = torch.where(difference > 0, bare + difference, log_p)
    if edit.top_k:
        log_p[log_p.argsort(descending=True)[edit.top_k :]] = -torch.inf
    return log_p.softmax(-1).detach()


EDITS = (
    TargetEdit(60.0),
    TargetEdit(60.0, one_sided=True),
    TargetEdit(20.0, top_k=3),
    TargetEdit(40.0, temperature=1.7),
)


@pytest.mark.parametrize("edit", EDITS)
def test_every_token_of_a_continuation_is_drawn_from_the_edited_target(facts, edit):
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float64)
    item, _ = _start(facts, loaded)
    rows, n = (item.ids, *item.experts, *item.novices), 600
    said = [one.ids for one in _decoded(loaded, (item, None), n, edit, 2)]
    first = torch.bincount(torch.tensor([ids[0] for ids in said]), minlength=loaded.model.config.vocab_size) / n
    assert (first - _product(loaded, rows, edit)).abs().sum() / 2 < 0.09
    # The second token, behind the first that was drawn oftenest.
    token = int(first.argmax())
    after = [ids[1] for ids in said if ids[0] == token and len(ids) > 1]
    second = torch.bincount(torch.tensor(after), minlength=len(first)) / len(after)
    grown = [(*row, token) for row in rows]
    assert (second - _product(loaded, grown, edit)).abs().sum() / 2 < 2 / len(after) ** 0.5
    without = TargetEdit(0.0 if edit == TargetEdit(edit.strength) else edit.strength)
    apart = [(_product(loaded, some, edit) - _product(loaded, some, without)).abs().sum() / 2 for some in (rows, grown)]
    assert max(apart) > 0.02


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_learned_along_a_continuation_can_be_the_edited_target(facts, edit):
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float64)
    item, token = _start(facts, loaded)
    (said,) = _decoded(loaded, (item, token), 1, edit, 4, learned=edit)
    for place in range(len(said.ids)):
        rows = [(*row, *said.ids[: place + 1]) for row in (item.ids, *item.experts, *item.novices)]
        wanted = _product(loaded, rows, edit)[said.predicted.ids[place]]
        torch.testing.assert_close(said.predicted.log_p[place].exp().double(), wanted, atol=1e-5, rtol=0)


def test_the_first_token_behind_a_contrast_that_does_not_last_is_drawn_from_the_edited_target(facts, loaded, erasure):
    source = contrast_sources(erasure())[0]
    item = contrasted(list(fact_contexts(facts, "questions", 0))[:1], source, loaded.tokenizer)[0]
    asked = erasure(strength=1.5, strength_ramp=True, target_top_k=5)
    first = _FirstTokens(asked, [item] * 400, torch.Generator().manual_seed(0))
    drawn = torch.tensor(first(range(400)))

    def mean(rows):
        logits = [loaded.model(torch.tensor([row])).logits[0, -1].double() for row in rows]
        return torch.stack([one.softmax(-1) for one in logits]).mean(0).log()

    log_p = mean([item.ids]) + 1.5 * (mean(item.novices) - mean([item.ids]))
    log_p[log_p.argsort(descending=True)[5:]] = -torch.inf
    share = torch.bincount(drawn, minlength=len(log_p)) / len(drawn)
    assert (share - log_p.softmax(-1)).abs().sum() / 2 < 0.1
    assert (share - mean([item.ids]).exp()).abs().sum() / 2 > 0.5
    assert first([3, 7]) == [int(drawn[3]), int(drawn[7])]


def test_targets_are_exact_over_the_whole_vocabulary_at_any_strength(facts, loaded, erasure):
    contexts = list(fact_contexts(facts, "texts", 0))[:4]
    source = PersonaContrast(loaded.tokenizer, ("Here is a text by an expert.",), ("Here is a text by a novice.",))
    items = contrasted(contexts, source, loaded.tokenizer)
    for edit in (*EDITS, TargetEdit(500.0), TargetEdit(1000.0, ramp=True, temperature=1.2, top_k=50)):
        for item, found in zip(items, Teacher(loaded.model).targets(items, edit, 16), strict=True):
            assert len(found.soft) == item.count
            for place in range(item.count):
                end = place + 1 - item.count
                rows = [row[: len(row) + end] for row in (item.ids, *item.experts, *item.novices)]
                here = edit
                if edit.ramp:
                    here = replace(edit, strength=1 + (edit.strength - 1) * place / (item.count - 1))
                wanted = _product(loaded, rows, here)
                got = found.soft.log_p[place].exp().double()
                # At a strength of 500 an error of 1e-6 in a log-probability is one of 1e-3 in the product.
                torch.testing.assert_close(
                    got, wanted[found.soft.ids[place]], atol=1e-5 * max(1, edit.strength), rtol=0
                )
                rest = 1 - float(wanted[found.soft.ids[place]].sum())
                assert float(found.soft.rest[place].exp()) == pytest.approx(rest, abs=1e-5 * max(1, edit.strength))


def test_what_is_drawn_does_not_depend_on_how_many_are_decoded_together(facts, loaded, monkeypatch):
    def said(seed):
        return [one.ids for one in _decoded(loaded, _start(facts, loaded), 7, TargetEdit(1.0), 9, seed)]

    together = said(0)
    monkeypatch.setattr(decoding, "CACHE_BUDGET", 1)
    assert said(0) == together != said(1)
    assert len(set(together)) > 1


def test_evenly_spread_chances_draw_each_token_as_often_as_its_probability_says():
    log_p = torch.randn(40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_p[[3, 39]] = -torch.inf
    log_p = log_p.log_softmax(-1)
    n = 20_000
    drawn = decoding.draw(log_p.expand(n, -1), (torch.arange(n) + 0.5) / n)
    share = torch.bincount(drawn, minlength=40) / n
    # Every token's share is off by less than one draw at each of its ends.
    assert (share - log_p.exp()).abs().max() < 2 / n and not share[[3, 39]].any()
    assert (share - log_p.exp().roll(1)).abs().max() > 0.01
    assert decoding.draw(log_p[None], torch.ones(1)).item() == 38


def test_a_teacher_that_holds_few_positions_at_a_time_says_the_same(facts, loaded, erasure, monkeypatch):
    source = contrast_sources(erasure())[0]
    contexts = list(fact_contexts(facts, "texts", 0))[:6]
    items = [item for item in contrasted(contexts, source, loaded.tokenizer) if item]
    rows = [item.ids for item in items]
    assert len(items) > 3 and max(item.count for item in items) > 1

    def said(most):
        monkeypatch.setattr(teacher, "positions_at_once", lambda *_: most)
        reader = Teacher(loaded.model)
        return reader.streams(items, 32), reader.top(rows, [1] * len(rows), 32)

    (all_streams, all_top), (few_streams, few_top) = said(10**6), said(2)
    for item, one, other in zip(items, all_streams, few_streams, strict=True):
        assert len(one.ids) == item.count
        for of_one, of_other in ((one.bare, other.bare), (one.expert, other.expert), (one.novice, other.novice)):
            torch.testing.assert_close(of_one, of_other, rtol=1e-4, atol=1e-4)
    for row, one, other in zip(rows, all_top, few_top, strict=True):
        assert len(one) == len(row) - 1
        torch.testing.assert_close(one.log_p, other.log_p, rtol=1e-4, atol=1e-4)


def test_contexts_without_a_contrast_make_no_sequence_and_are_counted(facts, loaded, erasure):
    source = SubjectContrast(loaded.tokenizer, {})
    asked = erasure(strength=1.0, fluency_tokens=0)
    contexts = list(fact_contexts(facts, "texts", 0))[:5]
    assert Teacher(loaded.model).streams([], 16) == Teacher(loaded.model).top([], [], 16) == []
    assert forget_sequences(asked, source, contexts) == ForgetData([], 5, 5, 0.0)
    data = forget_sequences(asked, contrast_sources(asked)[0], contexts)
    assert (len(data.sequences), data.without_contrast) == (5, 0)


def test_an_expert_made_by_training_knows_more_and_leaves_the_model_as_it_was(concept, erasure, loaded, tmp_path):
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    with Events().stage("train an expert") as stage:
        expert = reinforced(loaded, concept, ElmSettings(expert_steps=60), stage, tmp_path)
    texts = example_batch([Example(encode(loaded.tokenizer, text.text, True), 1) for text in concept.forget[:32]])

    def nats():
        with torch.no_grad():
            return float(sequence_nll(loaded.model, texts).sum())

    own = nats()
    with expert():
        assert nats() < 0.95 * own
    assert nats() == own
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items())
    source = ReinforcedContrast(loaded.tokenizer)
    apart, same = (
        check_target(replace(erasure(), teacher=teacher), [source], (0.0, 10.0)).curve
        for teacher in (Teacher(loaded.model, expert=expert), Teacher(loaded.model))
    )
    assert apart[0].accuracy == same[0].accuracy == same[1].accuracy
    assert apart[1].accuracy["forget"] < apart[1].accuracy["neighbour"] - 0.1 < apart[0].accuracy["forget"] - 0.1


def test_an_expert_that_learned_nothing_is_an_error(concept, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforced_module, "RATE", 0.0)
    with Events().stage("train an expert") as stage:
        expert = reinforced(loaded, concept, ElmSettings(expert_steps=1), stage, tmp_path)
    with pytest.raises(EditError, match="left 56 of 56 weights as they were"), expert():
        pass


@pytest.mark.parametrize("change", [{"contrast": "personas"}, {}])
def test_a_pack_with_neither_facts_nor_personas_is_read_by_personas_in_general_words(tmp_path, change):
    (tmp_path / "concept.yaml").write_text("{name: a, description: a, keywords: [a], license: x, source: x}")
    (tmp_path / "forget.jsonl").write_text('{"id": "1", "text": "a b c", "group": "T"}')
    (tmp_path / "retain.jsonl").write_text('{"id": "1", "text": "d e f"}')
    question = '{"id": "1", "split": "forget", "group": "T", "prompt": "a", "choices": ["b", "c"], "answer": 0}'
    (tmp_path / "questions.jsonl").write_text(question)
    with pytest.raises(RequestError, match="use contrast=personas"):
        prepare(ElmSettings(concept=str(tmp_path), out=tmp_path / "out", contrast="subjects"))
    job = prepare(ElmSettings(concept=str(tmp_path), out=tmp_path / "out", **change))
    assert job.adapter.concept.about.personas == PERSONAS and job.adapter.run.concept.about.personas is None
    assert job.adapter.run.concept.made[-1].startswith("personas in general words, such as 'Here is a text by a novice")
    asked = ElmSettings(concept=str(tmp_path), out=tmp_path / "out", contrast="reinforced")
    assert not prepare(asked).facts.facts
    with pytest.raises(RequestError, match="expert of the base's own weights"):
        prepare(asked.model_copy(update={"base_bits": 4}))


def test_presets_set_defaults_and_explicit_keys_win():
    assert (ElmSettings(preset="paper").rank, ElmSettings(preset="paper").strength) == (4, 500.0)
    assert ElmSettings(preset="reference").strength_ramp and ElmSettings(preset="reference").target_top_k == 50
    assert ElmSettings(preset="paper", rank=16).rank == 16
    assert ElmSettings().rank not in (4, 256)


def test_examples_with_shuffled_answers_tell_a_novice_nothing(facts, loaded, erasure):
    (source,) = contrast_sources(erasure(contrast="examples"))
    context = next(context for context in fact_contexts(facts, "questions", 0) if "\n" not in context.text)
    (expert,), (novice,) = source.rows(context)
    assert sorted(expert) == sorted(novice) and expert != novice
    end = len(loaded.tokenizer(context.text, add_special_tokens=False)["input_ids"])
    assert expert[-end:] == novice[-end:]
    assert source.rows(Context("The sky is")) == ([], [])


def test_what_a_teacher_read_is_kept_and_read_back_without_the_model(concept, facts, loaded, tmp_path, monkeypatch):
    from excise.artifacts.checkpoints.tensor_cache import TensorCache
    from excise.recipes.elm import teacher as module

    rows = [tuple(loaded.tokenizer(text.text)["input_ids"]) for text in concept.forget[:6]]
    kept = TensorCache(tmp_path / "kept", "this model")
    first = Teacher(loaded.model, cache=kept).top(rows, [0] * len(rows), 16)
    calls = []
    monkeypatch.setattr(module, "final_hidden_states", lambda *_: calls.append(1) or iter(()))
    second = Teacher(loaded.model, cache=kept).top(rows, [0] * len(rows), 16)
    assert not calls
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.log_p, other.log_p)
    # Another model's work is not taken for this one's, and a broken file counts as none.
    assert TensorCache(tmp_path / "kept", "another").get(sorted({row: len(row) for row in rows}.items())) is None
    for path in (tmp_path / "kept").glob("*"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(KeyError):
        Teacher(loaded.model, cache=kept).top(rows, [0] * len(rows), 16)
    assert calls


def test_kept_tensors_make_room_for_new_ones(tmp_path):
    import os

    from excise.artifacts.checkpoints.tensor_cache import TensorCache

    kept = TensorCache(tmp_path, "a model", budget=3000)
    for place in range(4):
        kept.put({"x": torch.full((200,), float(place))}, place)
        for age, path in enumerate(sorted(tmp_path.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True)):
            os.utime(path, (10**9 - age, 10**9 - age))
    assert kept.get(0) is None and kept.get(3)["x"][0] == 3
    assert sum(path.stat().st_size for path in tmp_path.glob("*")) <= 3000


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("questions", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_the_retain_term_is_the_mean_over_the_kinds_that_there_are(concept, loaded, questions, template, in_turn):
    few = replace(
        concept,
        retain=concept.retain[:6],
        questions=tuple(q for q in concept.questions if questions or q.split == "forget"),
    )
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    settings = ElmSettings(stored_tokens=16, max_contexts=8, chat_facts=2, max_new_tokens=4, retain_in_turn=in_turn)
    asked = Erasure(Teacher(loaded.model), tokenizer, few, find_facts(few), settings)
    sequences = retain_sequences(asked).sequences
    assert list(sequences) == ["texts"] + ["questions"] * questions + ["chats"] * template
    forget = [replace(sequences["texts"][0], weights=torch.zeros(0))]
    groups = arrange({"forget": forget, **sequences}, 12, 0, in_turn=in_turn)
    for group in groups:
        assert len(group) == (2 if in_turn else 1 + len(sequences))
        assert sum(float(one.weights.sum()) for one in group) == pytest.approx(1.0, abs=1e-5)


def test_the_teacher_reads_no_more_than_the_steps_do_and_few_contexts_mean_few_chats(erasure, loaded):
    counts = {}
    for steps in (1, 400):
        asked = erasure(steps=steps, batch_size=8, chat_facts=20, max_new_tokens=4)
        source = next(one for one in contrast_sources(asked) if one.name == "subjects")
        contexts = forget_contexts(asked, source)
        retained = retain_sequences(asked).sequences
        counts[steps] = len(contexts), max(map(len, retained.values()))
    # A step of 8 groups reads one context to forget in each, and one sequence to retain, of three kinds in turn.
    assert counts[1] == (8, 3) and counts[400] > (100, 100)
    every = retain_sequences(erasure(steps=1, batch_size=8, max_new_tokens=4, retain_in_turn=False)).sequences
    assert max(map(len, every.values())) == 8
    settings = ElmSettings(max_contexts=8)
    assert settings.chat_facts_read == 8 < ElmSettings().chat_facts_read == ElmSettings().chat_facts
    # 240 steps of 8 groups, and 400, which are more than there may be.
    assert ElmSettings().contexts_read == 1920
    assert ElmSettings(steps=400).contexts_read == ElmSettings().max_contexts == 2000


def test_what_does_not_fit_into_memory_is_read_from_files_that_go_with_it():
    from excise.recipes.elm.remembered import Pages

    tensors = [torch.randn(3, 5) for _ in range(4)]
    pages = Pages(torch.device("cpu"), room=2 * tensors[0].nbytes)
    kept = [pages.keep(tensor) for tensor in tensors]
    assert all(torch.equal(one, other) for one, other in zip(kept, tensors, strict=True))
    # The first two are what they were, the others lie in one mapped file.
    assert [one is other for one, other in zip(kept, tensors, strict=True)] == [True, True, False, False]
    folder = Path(pages._folder.name)
    assert len(list(folder.iterdir())) == 1
    assert kept[2].untyped_storage().data_ptr() == kept[3].untyped_storage().data_ptr()
    pages.clear()
    assert not folder.exists()
    again = pages.keep(torch.ones(2))
    assert again.sum() == 2


def test_targets_are_the_same_whether_the_teacher_pages_to_disk_or_not(concept, loaded, monkeypatch):
    from excise.recipes.elm import remembered, teacher

    rows = [tuple(loaded.tokenizer(text.text)["input_ids"]) for text in concept.forget[:6]]
    found = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(teacher, "Pages", lambda device, room=room: remembered.Pages(device, room=room))
        found.append(Teacher(loaded.model).top(rows, [0] * len(rows), 16))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.log_p, other.log_p)


def test_what_was_stored_last_stays_however_large_and_its_parts_come_back_in_order(tmp_path):
    from excise.artifacts.checkpoints.tensor_cache import TensorCache

    kept = TensorCache(tmp_path, "a model", budget=1000)
    kept.put_parts(({"x": torch.full((400,), float(n))} for n in range(3)), "rows")
    assert [float(part["x"][0]) for part in kept.get_parts("rows")] == [0, 1, 2]
    assert kept.get_parts("others") is None
    damaged = kept._path(("rows", "part", 1))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert [float(part["x"][0]) for part in kept.get_parts("rows")] == [0]
    damaged.unlink()
    assert kept.get_parts("rows") is None
