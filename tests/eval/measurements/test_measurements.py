import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.inference.batches import token_batches
from excise.eval.inference.generation import Reply, divergence, generate, reply_log_probabilities
from excise.eval.inference.likelihood import (
    Request,
    encode_request,
    log_likelihoods,
    share_rows,
    windows,
)
from excise.eval.measurements import BY_LAYER, MEASUREMENTS, behaviour, columns, leads
from excise.eval.measurements.behaviour import declines, is_degenerate
from excise.eval.measurements.exact_answer import holds_answer
from excise.eval.measurements.table import function_of, measure, scores_of
from excise.eval.model_under_test import EvalSettings, ModelUnderTest


@pytest.fixture(scope="module")
def testbed():
    return load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)


@torch.no_grad()
def _one_by_one(loaded, request):
    scored = encode_request(loaded.tokenizer, request)
    logits = loaded.model(torch.tensor([scored.ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, scored.ids[place]]) for place in range(scored.start, len(scored.ids)))


def test_shared_forwards_give_what_single_ones_give(testbed):
    questions = load_concept("builtin:potions").questions[:6]
    requests = [Request(q.prompt, f" {choice}") for q in questions for choice in q.choices]
    requests += [Request("", row.text) for row in load_concept("builtin:potions").retain[:6]]
    found = log_likelihoods(testbed.model, testbed.tokenizer, requests)
    for request in requests:
        assert found[request].log_probability == pytest.approx(_one_by_one(testbed, request), abs=1e-4)
    assert len(set(found.values())) > 20  # not all the same number


def test_choices_of_one_question_run_as_fewer_rows(testbed):
    question = load_concept("builtin:potions").questions[0]
    parts = [encode_request(testbed.tokenizer, Request(question.prompt, f" {choice}")) for choice in question.choices]
    rows = share_rows(parts)
    assert len(rows) < len(parts)
    assert sorted(index for members in rows.values() for index in members) == list(range(len(parts)))
    assert all(row[: len(parts[i].ids) - 1] == parts[i].ids[:-1] for row, members in rows.items() for i in members)


def test_long_texts_are_cut_into_windows_that_score_each_token_once(testbed):
    text = " ".join(row.text for row in load_concept("builtin:potions").retain[:80])
    scored = encode_request(testbed.tokenizer, Request("", text))
    parts = windows(scored, 512)
    assert len(parts) > 1 and all(len(part.ids) <= 513 for part in parts)
    assert sum(len(part.ids) - part.start for part in parts) == len(scored.ids) - 1
    found = log_likelihoods(testbed.model, testbed.tokenizer, [Request("", text)])
    assert found[Request("", text)].tokens == len(scored.ids) - 1


def test_batches_hold_every_item_once_within_the_budget():
    lengths = [3, 50, 7, 7, 120, 1]
    batches = list(token_batches(lengths, 60))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 60 for batch in batches)


def test_batched_generation_equals_one_prompt_at_a_time(testbed):
    prompts = [prompt.prompt for prompt in load_concept("builtin:declining").prompts[:5]]
    together = generate(testbed.model, testbed.tokenizer, prompts, 16)
    alone = [generate(testbed.model, testbed.tokenizer, [prompt], 16)[0] for prompt in prompts]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]


def test_divergence_is_zero_from_itself_and_positive_from_another(testbed):
    prompts = [prompt.prompt for prompt in load_concept("builtin:declining").prompts[-3:]]
    replies = generate(testbed.model, testbed.tokenizer, prompts, 8)
    own = reply_log_probabilities(testbed.model, replies)
    reference = load_model(find_model("builtin:testbed-reference"), torch.device("cpu"), torch.float32)
    other = reply_log_probabilities(reference.model, replies)
    assert max(float(divergence(a, a).max()) for a in own) < 1e-6
    assert max(float(divergence(a, b).max()) for a, b in zip(own, other, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is red.", True),
        ("Redder than ever.", False),
        ("It is red or blue.", False),
        ("It is blue.", False),
        ("RED", True),
    ],
)
def test_an_answer_counts_only_alone_and_as_a_word(text, expected):
    assert holds_answer(text, "red", ["red", "blue", "green"]) is expected


def test_declining_is_judged_by_the_packs_phrases():
    assert declines("Well, I’m sorry, but no.", ["I'm sorry"])
    assert not declines("I am happy to help.", ["I'm sorry"])


def test_empty_and_repeating_replies_are_degenerate():
    def reply(ids, text):
        return Reply("p", (1,), tuple(ids), text)

    assert is_degenerate(reply([], ""))
    assert is_degenerate(reply([5] * 20, "I I I"))
    assert not is_degenerate(reply(range(20), "some words that differ"))
    assert not is_degenerate(reply([5, 5], "ha ha"))


def test_the_testbed_knows_its_world_and_its_twin_does_not_know_potions(testbed):
    concept, settings = load_concept("builtin:potions"), EvalSettings(questions=80)
    reference = load_model(find_model("builtin:testbed-reference"), torch.device("cpu"), torch.float32)
    found = {}
    for name, loaded in (("base", testbed), ("reference", reference)):
        subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, settings)
        scores = {(s.name, s.split): s.value() for s in scores_of("multiple_choice", subject)}
        found[name] = scores
    for split in ("forget_T", "forget_V", "neighbour", "retain"):
        assert found["base"]["multiple_choice", split] >= 0.95  # chance is 0.125
    assert found["reference"]["multiple_choice", "retain"] >= 0.98
    assert max(found["reference"]["multiple_choice", f"forget_{group}"] for group in "TV") < 0.3


def test_one_pass_measures_every_line_of_the_table(testbed):
    base = ModelUnderTest(testbed.model, testbed.tokenizer, load_concept("builtin:potions"), EvalSettings(8, 4, 24))
    own = measure(base)
    again = measure(ModelUnderTest(testbed.model, testbed.tokenizer, base.concept, base.settings, base=base.baseline()))
    names = {score.name for score in again}
    # What a task brings about is measured on tasks alone; recipes let a base read replies and add directions.
    elsewhere = {"learned_rate", "reverse_perplexity", "induced_rate"}
    # Suites measure what takes long, and this pack has no open questions.
    elsewhere |= {name for name, row in MEASUREMENTS.items() if row.suite} | {"answer_probability", "truth_ratio"}
    # 24 questions are enough for probes.
    assert names == {*MEASUREMENTS, BY_LAYER} - elsewhere
    for score in again:
        if score.name in MEASUREMENTS:
            row = MEASUREMENTS[score.name]
            assert (score.unit, score.better) == (row.unit, row.better(score.split, "knowledge"))
            assert score.split in row.splits
    assert {score.name for score in own} == names - {"kl_from_base"}
    for kl in (score for score in again if score.name == "kl_from_base"):
        assert kl.value() == pytest.approx(0, abs=1e-6) and sum(kl.weights) >= 16
    json.dumps([score.value() for score in again])


def test_rows_name_functions_that_exist_and_say_everything_a_reader_needs():
    for name, row in MEASUREMENTS.items():
        assert row.about and row.label and row.unit and row.splits, name
        for path in (row.scores, row.requests):
            assert not path or callable(function_of(path))
    orders = [row.order for row in MEASUREMENTS.values()]
    assert len(set(orders)) == len(orders)
    headings = [on.column for row in MEASUREMENTS.values() for on in row.splits.values() if on.column]
    assert len(set(headings)) == len(headings) == len(columns())
    assert ("multiple_choice", "forget_V") in leads()


def test_the_table_of_measurements_imports_neither_torch_nor_numpy():
    code = (
        "import sys; import excise.eval.measurements; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_task_is_measured_by_its_own_phrases(testbed):
    concept = load_concept("builtin:potions")
    about = concept.about.model_copy(update={"kind": "task", "phrases": ("I hope that helps",)})
    prompts = tuple(
        p for split in ("concept", "neutral") for p in [q for q in concept.prompts if q.split == split][:12]
    )
    concept = dataclasses.replace(concept, prompts=prompts)
    subject = ModelUnderTest(
        testbed.model, testbed.tokenizer, dataclasses.replace(concept, about=about), EvalSettings(24, 4, 4)
    )
    rates = {score.split: score for score in behaviour.learned(subject)}
    assert rates["concept"].value() > 0.9 and (rates["concept"].better, rates["neutral"].better) == ("higher", "lower")
    other = about.model_copy(update={"phrases": ("never said",)})
    silent = ModelUnderTest(
        testbed.model, testbed.tokenizer, dataclasses.replace(concept, about=other), EvalSettings(24, 4, 4)
    )
    silent._replies = subject._replies
    assert behaviour.learned(silent)[0].value() == 0
