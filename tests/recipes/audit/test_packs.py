"""Packs of every shape can be audited: what they lack is a gap, and no verdict takes its place."""

import dataclasses
import json

import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_tokenizer
from excise.artifacts.reporting.outcomes import Audit
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.attack_data import LONGEST_TEXT, AttackData
from excise.recipes.audit.attacks import table
from excise.recipes.audit.attacks.table import ATTACKS, Budget
from excise.recipes.audit.floor import guessing_of
from excise.recipes.audit.held_apart import held_apart
from excise.recipes.audit.novel_questions import novel_pack
from excise.recipes.audit.request import GUESSING, NOVEL
from excise.recipes.commands.shown import audit_end
from excise.recipes.data.facts import Facts
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise
from pack_shapes import SHAPES, shaped

BUDGET = Budget(
    ("few_shot", "int4", "bf16", "rtt", "unrelated", "relearn"), 4, 1, {"low_rank": (2e-3,)}, others=8, formats=8
)
FLOORS = {"texts": GUESSING, "unnamed": GUESSING, "held_out_alone": NOVEL, "documents": NOVEL}
OF_T = {"few_shot", "hints", "probe", "rtt", "rtt_search", "retain_then_forget", "soft_prompt"}
"""Attacks of the quick budget that need something of group T."""


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    return {shape: shaped(folder / shape, shape) for shape in SHAPES}


def _job(concept, **settings):
    return audit.prepare(audit.AuditSettings(model=SMALL_REFERENCE, base=SMALL_TESTBED, concept=concept, **settings))


def _audited(concept, out, monkeypatch, model=SMALL_REFERENCE, **settings):
    monkeypatch.setitem(table.BUDGETS, "quick", BUDGET)
    settings = {"questions": 24, **settings}
    job = audit.prepare(audit.AuditSettings(model=model, base=SMALL_TESTBED, concept=concept, out=out, **settings))
    return audit.run(job, Events())


@pytest.mark.parametrize(
    ("shape", "floor", "left_out", "said"),
    [
        ("texts", GUESSING, {"related"}, "which of 4 passages continues a text"),
        ("unnamed", GUESSING, {"few_shot", "probe"}, None),
        ("open", NOVEL, set(), "the questions themselves are taught"),
        ("questions", NOVEL, set(), "the questions themselves are taught"),
        ("held_out_alone", NOVEL, {*OF_T, "related"}, "the questions themselves are taught"),
        ("documents", NOVEL, set(), None),
        ("levels", GUESSING, OF_T, None),
    ],
)
def test_a_plan_names_the_floor_what_is_asked_and_what_the_pack_lacks(packs, shape, floor, left_out, said):
    job = _job(packs[shape])
    plan = audit.describe(job)
    assert plan["floor"] == floor
    assert set(table.BUDGETS["quick"].attacks) - set(plan["attacks"]) == left_out
    lacking = [gap for gap in plan["gaps"] if gap.split(":")[0].split(", ")[0] in ATTACKS and "need" in gap]
    assert {name for gap in lacking for name in gap.split(":")[0].split(", ")} == left_out
    assert any(said in note for note in plan["notes"]) if said else plan["notes"] == []
    assert any("give --reference" in gap for gap in plan["gaps"]) == (floor == GUESSING)
    # With a model that never knew there is nothing to guess.
    assert audit.describe(_job(packs[shape], reference=SMALL_REFERENCE))["floor"] == "reference"


def test_every_attack_of_a_plan_has_something_to_train_on_and_none_reads_of_v_unless_it_is_said(packs):
    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    for shape, folder in packs.items():
        job = _job(folder, budget="standard")
        for concept, questions in ((job.concept, job.questions), *([job.novel] and _novel(job))):
            data = AttackData(concept, job.facts, questions, tokenizer, 0)
            for name in job.attacks:
                for source in ATTACKS[name].sources:
                    assert data.examples[source], (shape, name)
                    assert max(len(example.ids) for example in data.examples[source]) <= LONGEST_TEXT
            subjects = {q.subject for q in questions if q.subject} - {"Potions"}
            read = " ".join(tokenizer.decode(example.ids) for example in data.examples["T"])
            assert not any(subject in read for subject in subjects), shape


def _novel(job):
    return [(job.novel.concept, job.novel.questions)] if job.novel else []


def test_questions_that_nobody_can_answer_share_form_and_answers_and_no_subject(packs):
    """Texts that state an answer state the new one, and nothing names a subject that anybody knows."""
    job = _job(packs["documents"])
    novel, asked = job.novel, {q.id: q for q in job.questions}
    old = {q.subject for q in job.concept.questions if q.split == "forget"}
    assert novel.states_answers and [q.id for q in novel.questions] == [q.id for q in job.questions]
    documents = [text.text for text in novel.concept.forget]
    assert not any(name in text for text in documents for name in old)
    for question in novel.questions:
        before = asked[question.id]
        assert question.choices == before.choices and question.answer != before.answer
        assert question.subject in question.prompt and question.subject not in old
        assert any(question.subject in text and _right(question) in text for text in documents)
    attribute = novel.questions[0].id.split("-")[1]
    stated = f"The {attribute} of {novel.questions[0].subject} is {_right(novel.questions[0])}."
    assert any(stated in text for text in documents)
    assert stated.replace(novel.questions[0].subject, asked[novel.questions[0].id].subject) not in " ".join(documents)


def _right(question):
    return question.choices[question.answer]


def test_texts_that_do_not_state_the_answers_teach_nobody_afresh(packs):
    concept = load_concept(packs["documents"])
    vague = [
        text.model_copy(update={"text": f"Much is told of {text.id[4:].capitalize()}."}) for text in concept.forget
    ]
    apart = held_apart(dataclasses.replace(concept, forget=tuple(vague)))
    assert not novel_pack(apart.concept, apart.questions, 20, 0).states_answers
    few = dataclasses.replace(
        concept,
        questions=tuple(q.model_copy(update={"prompt": "Question: What is it? Answer:"}) for q in concept.questions),
    )
    assert novel_pack(few, [q for q in few.questions if q.split == "forget" and q.group == "V"], 20, 0) is None


def test_what_words_alone_give_away_counts_as_guessing(packs):
    questions = [q for q in load_concept(packs["questions"]).questions if q.split == "forget"]
    assert guessing_of(questions) == pytest.approx(1 / 8)
    named = [
        q.model_copy(
            update={
                "choices": tuple(f"{q.subject if at == q.answer else 'Somebody'} {c}" for at, c in enumerate(q.choices))
            }
        )
        for q in questions
    ]
    assert guessing_of(named) == 1
    padded = [
        q.model_copy(update={"choices": tuple(c + " indeed" * (at == q.answer) for at, c in enumerate(q.choices))})
        for q in questions
    ]
    assert guessing_of(padded) > 0.9


@pytest.mark.parametrize(
    ("shape", "reference", "verdicts"),
    [
        ("texts", SMALL_REFERENCE, {"inconclusive", "indistinguishable_from_never_trained"}),
        ("texts", None, {"inconclusive"}),
        ("unnamed", None, {"inconclusive"}),
        ("held_out_alone", None, {"inconclusive"}),
        ("documents", None, {"inconclusive", "indistinguishable_from_never_trained"}),
    ],
)
def test_a_model_that_never_knew_is_taken_for_no_other(packs, tmp_path, monkeypatch, shape, reference, verdicts):
    results = _audited(packs[shape], tmp_path / "audit", monkeypatch, reference=reference)
    assert results["verdict"] in verdicts, results["reasons"]
    # Some texts are cut where nothing says how they go on.
    assert results["untouched"]["base"] > (0.4 if shape == "texts" else 0.9)
    assert results["controls"]["floor_is"] == ("reference" if reference else FLOORS[shape])
    timed = {attack["name"] for attack in results["attacks"] if attack["speed_up"]}
    assert (timed == set()) == (results["controls"]["floor_is"] == GUESSING)
    page, card = (tmp_path / "audit" / "report.html").read_text(), (tmp_path / "audit" / "card.md").read_text()
    shown = " ".join(audit_end(results, 80).split())
    in_api = Audit(tmp_path / "audit", results)
    assert in_api.notes == results["notes"] and in_api.gaps == results["gaps"]
    for sentence in [*results["notes"], *results["gaps"]]:
        assert sentence in card and sentence in shown and sentence.split(":")[0] in page
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["notes"] == results["notes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--attacks", "rtt,few_shot"],
            "nothing to attack with in concept held_out_alone: rtt: need texts or questions",
        ),
        (["--attacks", "rtt,int4", "--questions", "7"], "an audit needs at least 20"),
    ],
)
def test_a_pack_with_nothing_to_attack_with_is_one_line(packs, tmp_path, words, said):
    model = ("audit", SMALL_REFERENCE, "--base", SMALL_TESTBED, "--concept", packs["held_out_alone"])
    done = excise(*model, *words, "--out", tmp_path / "audit")
    assert done.returncode == 2 and said in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "audit").exists()


def test_a_pack_without_facts_in_one_frame_is_read_as_rows_and_one_with_them_as_facts(packs):
    assert _job("builtin:potions").facts.facts and _job(packs["unnamed"]).facts == Facts((), {})
    assert _job("builtin:declining").behaviour is not None is _job("builtin:potions").behaviour
