"""Measurements of the three criteria of erasure, each with what it must not be fooled by."""

import math
import re

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.artifacts.reporting.findings import findings
from excise.artifacts.reporting.results import measurements_as_json, read_measurements, summarize_all, table
from excise.editing.errors import RequestError
from excise.eval.inference.generation import Reply, generate
from excise.eval.inference.likelihood import Request, log_likelihoods
from excise.eval.intervals import tango
from excise.eval.measurements.cloze import extraction
from excise.eval.measurements.cloze import scores as cloze
from excise.eval.measurements.fluency import (
    distinct_runs,
    is_on_topic,
    novice_text,
    repeated_quadruples,
    reverse_perplexity,
)
from excise.eval.measurements.probe import Asked, fit_probe
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from excise.eval.statistics import Scores
from excise.recipes.elm.story import below_chance
from helpers import SMALL_REFERENCE, SMALL_TESTBED


def _load(name):
    return load_model(find_model(f"builtin:{name}"), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def testbed():
    return _load("testbed")


@pytest.fixture(scope="module")
def reference():
    return _load("testbed-reference")


def _subject(loaded):
    return ModelUnderTest(loaded.model, loaded.tokenizer, load_concept("builtin:potions"), EvalSettings(questions=30))


def _values(scores):
    return {(score.name, score.split): score.value() for score in scores}


def test_greedy_tokens_and_ranks_are_those_of_a_plain_forward(testbed):
    request = Request("The sky is blue. The", " water is wet and the sky is blue.")
    found = log_likelihoods(testbed.model, testbed.tokenizer, [request])[request]
    ids = testbed.tokenizer(request.prompt + request.continuation)["input_ids"]
    start = len(ids) - found.tokens
    with torch.no_grad():
        logits = testbed.model(torch.tensor([ids])).logits[0]
    assert found.greedy == tuple(int(logits[i - 1].argmax()) == ids[i] for i in range(start, len(ids)))
    assert found.rank == 1 + int((logits[start - 1] > logits[start - 1, ids[start]]).sum())
    assert 0 <= found.recited <= found.tokens


def test_cloze_tells_the_model_that_knows_from_the_one_that_does_not(testbed, reference):
    knows, ignorant = _values(cloze(_subject(testbed))), _values(cloze(_subject(reference)))
    for split in ("forget_T", "forget_V"):
        assert knows["cloze_exact", split] >= 0.9 and ignorant["cloze_exact", split] <= 0.2
        assert knows["cloze", split] > ignorant["cloze", split] + 1
        assert knows["cloze_rank", split] < 1.2 < 3 < ignorant["cloze_rank", split]
    assert ignorant["cloze_exact", "neighbour"] >= 0.9


def test_texts_that_were_learned_are_recited_further(testbed, reference):
    knows, ignorant = _values(extraction(_subject(testbed))), _values(extraction(_subject(reference)))
    for split in ("forget_T", "forget_V"):
        assert knows["extraction_strength", split] > ignorant["extraction_strength", split] + 0.2


def _asked(questions, carried, seed):
    """Questions of 4 choices among 12 answers; the state carries ``carried`` of a fixed linear image of the true
    one."""
    generator = torch.Generator().manual_seed(7)
    answers_known = torch.randn(12, 32, generator=generator)
    image = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    generator = torch.Generator().manual_seed(seed)
    options = [torch.randperm(12, generator=generator)[:4] for _ in range(questions)]
    answers = torch.randint(0, 4, (questions,), generator=generator).tolist()
    true = torch.stack([answers_known[some[answer]] for some, answer in zip(options, answers, strict=True)])
    states = torch.randn(1, questions, 32, generator=generator)
    states[0] += carried * true @ image
    return Asked(states, [answers_known[some] for some in options], answers)


def test_a_probe_finds_what_is_linearly_there_and_nothing_else():
    learned, tested = _asked(120, 2.0, 0), _asked(120, 2.0, 1)
    expected, hits = fit_probe(learned, tested, 0, learned.answers)
    assert expected > 0.9 and sum(hits) / len(hits) > 0.9
    shuffled = torch.randint(0, 4, (120,), generator=torch.Generator().manual_seed(9)).tolist()
    control, _ = fit_probe(learned, tested, 0, shuffled)
    assert control < 0.45
    bare = _asked(120, 0.0, 0)
    nothing_there = fit_probe(bare, _asked(120, 0.0, 1), 0, bare.answers)[1]
    assert abs(sum(nothing_there) / 120 - 0.25) < 0.15


def test_the_probe_reads_the_answer_from_the_model_that_knows_it_alone(testbed, reference):
    from excise.eval.measurements.probe import scores as probe

    settings = EvalSettings()
    knows, ignorant = (
        _values(probe(ModelUnderTest(m.model, m.tokenizer, load_concept("builtin:potions"), settings)))
        for m in (testbed, reference)
    )
    assert knows["probe", "forget_V"] > 0.5 > 0.3 > ignorant["probe", "forget_V"]
    assert knows["probe_control", "forget_V"] < 0.4


def test_repeating_nothing_is_fluent_but_shows_beside_it(testbed):
    sensible = Reply("p", (1,), (2,), "The colour of the river is not known to me. I hope that helps.")
    empty = Reply("p", (1,), (2,), "I hope that helps. " * 6)
    low, high = (
        reverse_perplexity(testbed.model, testbed.tokenizer, ["a"], [reply]).value() for reply in (empty, sensible)
    )
    assert low < high
    assert repeated_quadruples(empty.text)[0] > 10 and repeated_quadruples(sensible.text)[0] == 0
    distinct, total = distinct_runs(empty.text, 2)
    assert distinct / total < 0.3


def test_gibberish_has_a_high_reverse_perplexity_and_empty_replies_are_counted(testbed):
    replies = [Reply("p", (1,), (2,), text) for text in ("I have never heard of that.", "zq xv kk jw qq zx vv", "")]
    plain, gibberish = (
        reverse_perplexity(testbed.model, testbed.tokenizer, ["a"], [reply]).value() for reply in replies[:2]
    )
    assert gibberish > 5 * plain
    together = reverse_perplexity(testbed.model, testbed.tokenizer, ["a", "b", "c"], replies)
    assert (len(together.ids), together.skipped) == (2, 1)


def test_a_reply_is_on_topic_if_it_takes_up_the_prompt_or_a_keyword():
    def reply(text):
        return Reply("Could you tell me the colour of Hoogrith, please?", (1,), (2,), text)

    assert is_on_topic(reply("The colour is a mystery."), [])
    assert is_on_topic(reply("Nobody knows that potion."), ["potion"])
    assert not is_on_topic(reply("Could you tell me, please?"), ["potion"])


def test_the_novices_own_text_is_the_measure_of_fluent_ignorance(testbed):
    ids, replies = novice_text(_subject(testbed))
    assert len(ids) == len(replies) > 10
    assert sum(reply.text != "" for reply in replies) == len(replies)


def test_sampled_replies_repeat_with_their_seed_and_differ_without(testbed):
    prompts = ["What is the colour of it?", "Tell me the taste."]

    def said(seed):
        return [r.ids for r in generate(testbed.model, testbed.tokenizer, prompts, 12, sample_seed=seed)]

    assert said(0) == said(0)
    assert said(0) != said(1)


def test_a_geometric_mean_of_ones_is_one_and_tells_of_no_interval():
    scores = Scores("cloze_rank", "s", "rank", "base", ("a", "b"), (0.0, 0.0), (1.0, 1.0), exponential=True)
    assert scores.value() == 1 and scores.interval() is None
    assert math.isclose(Scores("x", "s", "rank", "base", ("a",), (math.log(4),), (1.0,), exponential=True).value(), 4)


def test_findings_lead_with_the_three_criteria(testbed, reference):
    pairs = {}
    for name, loaded in (("base", testbed), ("edited", reference)):
        subject = _subject(loaded)
        from excise.eval.measurements.multiple_choice import scores as multiple_choice

        pairs[name] = [*multiple_choice(subject), *cloze(subject)]
    results = {
        "measurements": measurements_as_json(summarize_all(pairs)),
        "edited": {"tied": False, "how": "x"},
        "concept": {"kind": "knowledge", "name": "potions"},
    }
    lines = findings(results)
    starts = [line.split(":")[0] for line in lines]
    assert starts == [
        "Held-out questions (V)",
        "Questions it may be trained on (T)",
        "Questions on related topics (neighbour)",
        "Questions on everything else (retain)",
    ]
    criteria = [row.on.criterion for row in table(read_measurements(results)) if row.name == "multiple_choice"]
    assert criteria == ["Innocence", "Innocence", "Specificity", "Specificity"]
    # One line each, and no number without its interval, its n and the base's value.
    assert all(len(line) <= 120 and re.search(r": \d\.\d{3} → \d\.\d{3} \[.*\], n = \d+\.$", line) for line in lines)
    same = {
        **results,
        "measurements": measurements_as_json(summarize_all({"base": pairs["base"], "edited": pairs["base"]})),
    }
    # Questions on 20 subjects, none of which changed, leave room for a loss: that of 20 independent ones.
    allowed = -tango(0, 0, 20)[0]
    assert findings(same)[0] == (
        f"This edit is not shown to remove the knowledge: multiple choice fell by at most {allowed:.3f} on group T (n = 30)"
        f" and {allowed:.3f} on group V (n = 30), by 95% intervals that hold no loss too."
    )
    assert not any("not shown" in line for line in lines)


def test_answers_below_chance_are_said_to_be_avoided():
    def accuracy(name, value, n=80):
        hits = tuple(float(i < value * n) for i in range(n))
        return Scores(name, "forget_V", "accuracy", "lower", tuple(map(str, range(n))), hits, (1.0,) * n)

    def said(edited, reference=None):
        scores = {"base": [accuracy("multiple_choice", 1.0)], "edited": [accuracy("multiple_choice", edited)]}
        if reference is not None:
            scores["reference"] = [accuracy("multiple_choice", reference)]
        results = {
            "measurements": measurements_as_json(summarize_all(scores)),
            "edited": {"tied": False, "how": "x"},
            "concept": {"kind": "knowledge", "name": "potions"},
            "target_check": {"chance": 0.125},
        }
        return any("below chance" in sentence for sentence in below_chance(results))

    assert said(0.0) and said(0.0, reference=0.125)
    assert not said(0.125) and not said(0.0, reference=0.0)


def test_eval_alone_lets_the_base_read_the_replies():
    from excise.artifacts.events import Events
    from excise.recipes import evaluate

    settings = EvalSettings(max_new_tokens=8, kl_prompts=4, questions=8)

    def measured(model, concept, **more):
        job = evaluate.prepare([model], concept, device="cpu", dtype="float32", settings=settings, **more)
        return evaluate.run(job, Events()).results[0]

    found = measured(SMALL_REFERENCE, "builtin:potions", base=SMALL_TESTBED)
    judged = [m for m in found["measurements"] if m["name"] == "reverse_perplexity"]
    assert [m["subject"] for m in judged] == ["base", "edited"]
    # Two models say different things, and neither is read as certain.
    assert judged[0]["value"] != judged[1]["value"] and min(m["value"] for m in judged) > 1
    alone = measured(SMALL_REFERENCE, "builtin:potions")
    assert not [m for m in alone["measurements"] if m["name"] == "reverse_perplexity"]
    by_others = measured(SMALL_REFERENCE, "builtin:potions", judges=[SMALL_TESTBED, SMALL_REFERENCE])
    values = {m["split"]: m["value"] for m in by_others["measurements"] if m["name"] == "reverse_perplexity"}
    # The first judge is the base of above; the second reads its own greedy replies, which are the likeliest to it.
    assert values["concept, by testbed"] == pytest.approx(judged[1]["value"])
    assert values["concept, by testbed-reference"] < values["concept, by testbed"]
    with pytest.raises(RequestError, match="has no prompts on knowledge"):
        measured("builtin:testbed", "builtin:shortcut", judges=["builtin:testbed"])
