"""Finding facts in a pack, asking them in many forms, and setting a novice against an expert."""

from dataclasses import replace

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.errors import EditError, RequestError
from excise.editing.training.soft_targets import keep_streams
from excise.recipes.common.examples import Example, example_batch, sequence_nll
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import Context, Fact, bare_question, fact_contexts, find_facts, question_contexts
from excise.recipes.elm import decoding, teacher
from excise.recipes.elm import reinforced_expert as reinforced_module
from excise.recipes.elm.contrast import (
    PersonaContrast,
    ReinforcedContrast,
    SubjectContrast,
    contrast_sources,
    contrasted,
    reference_subjects,
)
from excise.recipes.elm.decoding import Decoding, decode
from excise.recipes.elm.erasure import Erasure
from excise.recipes.elm.forget_data import ForgetData, edited_target, forget_contexts, forget_sequences
from excise.recipes.elm.recipe import ElmSettings, prepare
from excise.recipes.elm.reinforced_expert import reinforced
from excise.recipes.elm.target_check import Point, _best, check_target
from excise.recipes.elm.teacher import Teacher
from excise.recipes.testbed.world import make_world
from torch._subclasses.fake_tensor import FakeTensorMode


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
    useless = PersonaContrast(loaded.tokenizer, "Here is a text.", "Here is a text.")
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
    """Chance is 0.25; 17 of 80 may well be chance, 12 of 80 and 170 of 800 hardly."""
    best, separates = _best(_curve(60, 17, 12, 3, n=80), 0.25, 80)
    assert separates and best.strength == 2.0
    best, separates = _best(_curve(600, 170, 120, 30, n=800), 0.25, 800)
    assert separates and best.strength == 1.0
    # So few that no number would do; none right is as low as a target goes.
    assert _best(_curve(8, 1, 0, n=8), 0.125, 8)[0].strength == 2.0
    assert not _best(_curve(8, 1, 1, n=8), 0.125, 8)[1]


def test_a_strength_that_was_asked_for_is_the_one_that_is_judged(erasure):
    assert _best(_curve(60, 17, 12, 3, n=80), 0.25, 80, 3.0)[0].strength == 3.0
    assert not _best(_curve(60, 17, 12, 3, n=80), 0.25, 80, 1.0)[1]
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
    source = PersonaContrast(loaded.tokenizer, "Here is a text by an expert.", "Here is a text by a novice.")
    item = contrasted([context], source, loaded.tokenizer)[0]
    return item, loaded.tokenizer(f" {context.fact.answer}")["input_ids"][0]


def _decoded(loaded, start, count, strength, tokens, seed=0):
    item, token = start
    generator = torch.Generator().manual_seed(seed)
    return decode(
        Teacher(loaded.model),
        loaded.tokenizer,
        [(item, item.count)] * count,
        lambda some: [token] * len(some),
        Decoding(strength, tokens, stored_tokens=16),
        generator,
    )


def test_decoding_in_lockstep_is_the_product_of_its_streams(facts, loaded):
    start = _start(facts, loaded)
    drawn = [[one.ids for one in _decoded(loaded, start, 3, strength, 6)] for strength in (0.0, 0.0, 20.0)]
    assert drawn[0] == drawn[1] and all(row[0] == start[1] and len(row) <= 6 for row in drawn[0])
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_decoding_leaves_behind_what_the_frozen_model_predicts_along_it(facts, loaded, strength):
    item, token = _start(facts, loaded)
    found = _decoded(loaded, (item, token), 3, strength, 7)
    rows = [(*item.ids, *said.ids) for said in found]
    read = Teacher(loaded.model).top(rows, [len(item.ids)] * 3, 16)
    for said, wanted in zip(found, read, strict=True):
        assert len(said.bare) == len(said.ids) == len(wanted)
        assert torch.allclose(said.bare.log_p, wanted.log_p, atol=1e-3)
        # Each position's own, and not its neighbour's.
        assert not torch.allclose(said.bare.log_p[1:], wanted.log_p[:-1], atol=1e-1)


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
        [(longer, len(longer.ids)), (item, item.count)],
        lambda some: [token] * len(some),
        Decoding(strength=3.0, tokens=3, stored_tokens=16),
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


def test_the_first_token_of_a_continuation_is_drawn_from_the_edited_target(facts, loaded, erasure):
    source = contrast_sources(erasure())[0]
    contexts = list(fact_contexts(facts, "questions", 0))[:24]
    items = contrasted(contexts, source, loaded.tokenizer)
    asked = erasure(strength=1.5, strength_ramp=True, weighting="uniform", fluency_tokens=1, seed=7)
    sequences = forget_sequences(asked, source, contexts).sequences
    said = [sequence.ids[len(item.ids)] for sequence, item in zip(sequences, items, strict=True)]
    streams = Teacher(loaded.model).streams(items, 16)
    targets = [edited_target(asked, stream, ramp=True) for stream in streams]

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        places = [int(torch.multinomial(target.log_p[-1].exp(), 1, generator=generator)) for target in targets]
        return [int(target.ids[-1, place]) for target, place in zip(targets, places, strict=True)]

    assert said == drawn(7) != drawn(8)


def test_a_growing_strength_is_where_the_streams_are(erasure):
    with FakeTensorMode():
        log_p = torch.zeros(5, 12, device="meta").log_softmax(-1)
        streams = keep_streams(log_p, log_p, log_p, 4)
        target = edited_target(erasure(strength=1.5, strength_ramp=True, target_top_k=3), streams, ramp=True)
        assert target.log_p.device.type == "meta"


def test_what_is_drawn_does_not_depend_on_how_many_are_decoded_together(facts, loaded, monkeypatch):
    def said(seed):
        return [one.ids for one in _decoded(loaded, _start(facts, loaded), 7, 1.0, 9, seed)]

    together = said(0)
    monkeypatch.setattr(decoding, "CACHE_BUDGET", 1)
    assert said(0) == together != said(1)
    assert len(set(together)) > 1


def test_evenly_spread_chances_draw_each_token_as_often_as_its_probability_says():
    streams = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    bare, expert, novice = streams
    n = 20_000
    chances = (torch.arange(n) + 0.5) / n
    for strength in (0.5, 2.0):
        wanted = (bare + strength * (novice - expert)).softmax(-1)
        drawn = decoding._draw(streams.repeat(n, 1), 3, strength, chances)
        share = torch.bincount(drawn, minlength=40) / n
        # Every token's share is off by less than one draw at each of its ends.
        assert (share - wanted).abs().max() < 2 / n
        assert (share - bare.exp()).abs().max() > 0.05
    assert decoding._draw(bare[None], 1, 0.0, torch.ones(1)).item() == 39


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


@pytest.mark.parametrize("change", [{"contrast": "subjects"}, {"contrast": "personas"}, {}])
def test_a_pack_with_neither_facts_nor_personas_is_refused_before_loading(tmp_path, change):
    (tmp_path / "concept.yaml").write_text("{name: a, description: a, keywords: [a], license: x, source: x}")
    (tmp_path / "forget.jsonl").write_text('{"id": "1", "text": "a b c", "group": "T"}')
    (tmp_path / "retain.jsonl").write_text('{"id": "1", "text": "d e f"}')
    question = '{"id": "1", "split": "forget", "group": "T", "prompt": "a", "choices": ["b", "c"], "answer": 0}'
    (tmp_path / "questions.jsonl").write_text(question)
    with pytest.raises(RequestError, match=r"contrast=personas|personas"):
        prepare(ElmSettings(concept=str(tmp_path), out=tmp_path / "out", **change))
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
