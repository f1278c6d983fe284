"""Probabilities, truth ratios and ROUGE of open answers, against plain forwards in float64."""

import math
from dataclasses import replace

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.inference.likelihood import Request, encode_request
from excise.eval.measurements.cloze import scores as cloze
from excise.eval.measurements.exact_answer import completed_questions
from excise.eval.measurements.open_answers import losses, open_by_split, rouge_scores, scores
from excise.eval.measurements.recitation import answer_in, knowledge, verbatim, with_shots
from excise.eval.measurements.table import measure, workload
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from helpers import SMALL_REFERENCE, SMALL_TESTBED
from suite_packs import suite_pack, write_pack


@pytest.fixture(scope="module")
def models():
    def loaded(name):
        return load_model(find_model(name), torch.device("cpu"), torch.float32)

    return {"knows": loaded(SMALL_TESTBED), "ignorant": loaded(SMALL_REFERENCE)}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return load_concept(suite_pack("tofu", tmp_path_factory.mktemp("packs"), count=6))


def _subject(loaded, concept, **settings):
    return ModelUnderTest(loaded.model, loaded.tokenizer, concept, EvalSettings(kl_prompts=4, **settings))


@torch.no_grad()
def _loss(loaded, question, answer):
    """As open-unlearning computes it: the whole chat is tokenized, and the answer with its end token is scored."""
    tokenizer = loaded.tokenizer
    chat = [{"role": "user", "content": question}]
    front = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(front + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(front, add_special_tokens=False)["input_ids"])
    log_p = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    parts = [float(log_p[place - 1, ids[place]]) for place in range(start, len(ids))]
    return -sum(parts) / len(parts)


def test_losses_are_those_of_plain_forwards_with_the_end_token(models, tofu):
    loaded, rows = models["knows"], [row for row in tofu.open_questions if row.split == "forget"]
    for row, found in zip(rows, losses(_subject(loaded, tofu), rows), strict=True):
        assert found.answer == pytest.approx(_loss(loaded, row.prompt, row.answer), abs=1e-4)
        assert found.paraphrased == pytest.approx(_loss(loaded, row.prompt, row.paraphrased_answer), abs=1e-4)
        wrong = [_loss(loaded, row.prompt, one) for one in row.perturbed_answers]
        assert found.perturbed == pytest.approx(wrong, abs=1e-4)
        assert found.ratio == pytest.approx(math.exp(sum(wrong) / len(wrong) - found.paraphrased), rel=1e-3)


def test_a_model_without_a_template_is_asked_with_the_words_question_and_answer(models):
    tokenizer = models["knows"].tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        scored = encode_request(tokenizer, Request("What is the taste of tea?", "sweet", reply=True))
        plain = encode_request(tokenizer, Request("Question: What is the taste of tea?\nAnswer:", " sweet"))
    finally:
        tokenizer.chat_template = template
    assert scored.ids == (*plain.ids, tokenizer.eos_token_id) and scored.start == plain.start


def test_the_ordinary_run_measures_open_questions_and_leaves_the_slow_rows_to_suites(models, tofu):
    subject = _subject(models["knows"], tofu, questions=6)
    asked = [subject]
    found = {(one.name, one.split): one for one in measure(asked[0])}
    for split in ("forget_T", "forget_V", "retain"):
        assert found["answer_probability", split].ids == found["truth_ratio", split].ids
        assert 0 < found["cloze_probability", split].value() <= 1
    assert "rouge_l_recall" not in {name for name, _ in found}
    without = replace(tofu, open_questions=())
    # A pack without open questions costs nothing more.
    choices = {request for request in subject._likelihoods if not request.reply}
    assert workload(without, subject.settings) < workload(tofu, subject.settings)
    completions = sum(len(completed_questions(without, subject.settings, split)) for split in ("concept", "neutral"))
    # Where the pack has no neutral prompts, everyday requests are replied to.
    replies = sum(len(subject.prompts(split)) for split in ("concept", "neutral"))
    assert workload(without, subject.settings) == len(choices) + replies + completions


def test_truth_ratios_and_rouge_tell_the_model_that_knows_from_the_one_that_does_not(models, tofu):
    found = {}
    for name, loaded in models.items():
        subject = _subject(loaded, tofu, max_new_tokens=24)
        found[name] = {
            (one.name, one.split): one for one in (*scores(subject), *rouge_scores(subject), *cloze(subject))
        }
    knows, ignorant = found["knows"], found["ignorant"]
    for split in ("forget_T", "forget_V"):
        # Replies of this model go on behind the answer, so the end token is unlikely there.
        assert knows["answer_probability", split].value() > 10 * ignorant["answer_probability", split].value()
        for name in ("rouge_l_recall", "cloze_probability"):
            assert knows[name, split].value() > ignorant[name, split].value() + 0.05, name
        assert knows["truth_ratio", split].value() < ignorant["truth_ratio", split].value()
    assert ignorant["cloze_probability", "retain"].value() > 0.3  # of 6 choices


def test_the_share_among_choices_is_a_softmax_of_mean_log_probabilities(models):
    concept = load_concept("builtin:potions")
    subject = _subject(models["ignorant"], concept, questions=5)
    found = {one.split: one for one in cloze(subject) if one.name == "cloze_probability"}["forget_V"]
    questions = {question.id: question for question in concept.questions}
    for key, value in zip(found.ids, found.totals, strict=True):
        question = questions[key]
        likelihoods = subject.likelihoods([Request(question.prompt, f" {choice}") for choice in question.choices])
        naive = torch.tensor([one.log_probability / one.tokens for one in likelihoods], dtype=torch.float64).softmax(-1)
        assert value == pytest.approx(float(naive[question.answer]), abs=1e-9)


def test_what_should_stay_is_asked_in_group_v_and_wrong_answers_are_needed_for_a_ratio(tmp_path, models):
    row = {"split": "retain", "prompt": "What is it?", "answer": "red"}
    rows = [
        {**row, "id": "a", "group": "T", "prompt": "Which?"},
        {**row, "id": "b", "group": "V", "subject": "x"},
        {**row, "id": "c", "group": "V", "perturbed_answers": ["blue", "green"]},
    ]
    concept = load_concept(write_pack(tmp_path / "pack", None, {"open_questions": rows}))
    assert [one.id for one in open_by_split(concept)["retain"]] == ["b", "c"]
    found = {one.name: one for one in scores(_subject(models["knows"], concept))}
    assert found["answer_probability"].ids == ("b", "c") and found["truth_ratio"].ids == ("c",)
    assert found["truth_ratio"].skipped == 1


def test_passages_are_recited_and_answers_end_where_the_next_question_begins(models, tmp_path):
    concept = load_concept(suite_pack("muse", tmp_path, count=6))
    texts = [{"id": str(n), "prompt": "The colour of", "continuation": "x"} for n in range(2)]
    # What the model says itself, greedily, is a passage that it recites.
    subject = _subject(models["knows"], concept, max_new_tokens=12)
    said = subject.completions([texts[0]["prompt"]], 12)[0].text
    rows = tuple(row.model_copy(update={"prompt": "The colour of", "continuation": said}) for row in concept.passages)
    recited = verbatim(_subject(models["knows"], replace(concept, passages=rows), max_new_tokens=12))
    assert [one.split for one in recited] == ["forget"] and recited[0].value() == 1
    other = verbatim(_subject(models["ignorant"], replace(concept, passages=rows), max_new_tokens=12))
    assert other[0].value() < 1
    assert {one.split for one in knowledge(subject)} == {"forget_T", "forget_V", "retain"}
    assert answer_in(" red\n\nQuestion: What?") == " red" and answer_in("red\nQuestion: x") == "red"
    shown = with_shots("What is it?", [shot for shot in concept.shots if shot.split == "forget"])
    assert shown.count("Question: ") == 3 and shown.endswith("\n\nQuestion: What is it?\nAnswer:")


def test_answers_that_rouge_cannot_see_are_counted_and_not_called_forgotten(models, tmp_path):
    row = {"split": "forget", "group": "V", "prompt": "What is the colour of Traipar?"}
    rows = [{**row, "id": "a", "answer": "red"}, {**row, "id": "b", "answer": "红色"}]
    passages = [{"id": "p", "prompt": "The colour", "continuation": "红色"}]
    pack = write_pack(tmp_path / "pack", None, {"open_questions": rows, "passages": passages})
    subject = _subject(models["knows"], load_concept(pack), max_new_tokens=8)
    for found in (*rouge_scores(subject), *knowledge(subject)):
        assert (found.ids, found.skipped) == (("a",), 1)
    assert [(found.is_empty, found.skipped) for found in verbatim(subject)] == [(True, 1)]
