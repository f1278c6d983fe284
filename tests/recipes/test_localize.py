"""The command that traces facts: what it traces, what it leaves out and counts, and what it writes."""

import json

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_tokenizer
from excise.editing.errors import RequestError
from excise.recipes.data.facts import find_facts
from excise.recipes.localize import pairs_of, prepare, run
from helpers import SMALL_LAYERS, SMALL_REFERENCE, SMALL_TESTBED, excise


@pytest.fixture(scope="module")
def found():
    return run(prepare(SMALL_TESTBED, "builtin:potions", facts=24, checked=6), Events(), "cpu", "float32")


def test_prompts_of_a_pair_differ_in_the_subject_alone_and_each_answer_is_its_subjects():
    facts, tokenizer = find_facts(load_concept("builtin:potions")), load_tokenizer(find_model(SMALL_TESTBED))
    pairs, alone = pairs_of(facts, tokenizer, 0, 10_000)
    assert len(pairs) + alone == len(facts.facts) and len(pairs) > 100
    answers = {(fact.subject, tokenizer(f" {fact.answer}")["input_ids"][0]) for fact in facts.facts}
    for pair in pairs[:40]:
        start, end = pair.subject
        assert len(pair.clean) == len(pair.corrupted) and pair.answer != pair.other
        assert pair.clean[:start] == pair.corrupted[:start] and pair.clean[end:] == pair.corrupted[end:]
        assert pair.name in tokenizer.decode(pair.clean) and pair.name not in tokenizer.decode(pair.corrupted)
        assert (pair.name, pair.answer) in answers


def test_every_site_has_an_effect_with_its_interval_and_the_same_seed_gives_the_same(found):
    sites = {(effect.site.layer, effect.group) for effect in found.restored}
    assert sites == {(layer, group) for layer in range(SMALL_LAYERS) for group in ("subject", "between", "last")}
    assert all(e.ci95[0] - 1e-6 <= e.value <= e.ci95[1] + 1e-6 for e in found.attributed if e.ci95)
    again = run(prepare(SMALL_TESTBED, "builtin:potions", facts=24, checked=0), Events(), "cpu", "float32")
    assert again.attributed == found.attributed and again.agreement == {} and again.checked == 0


def test_a_model_that_never_knew_the_facts_has_nothing_to_trace(found):
    """The model that read about them knows each; its twin knows none, and no average is made of that."""
    assert (found.facts, found.unknown) == (24, 0)
    with pytest.raises(RequestError, match=r"only 0 facts .* the model does not know 24"):
        run(prepare(SMALL_REFERENCE, "builtin:potions", facts=24, checked=0), Events(), "cpu", "float32")


def test_the_command_shows_writes_and_prints(tmp_path):
    arguments = ("localize", SMALL_TESTBED, "--concept", "builtin:potions", "--facts", 12, "--checked", 5)
    done = excise(*arguments, "--out", tmp_path / "l")
    assert done.returncode == 0 and "attention s b l" in done.stdout and "--set layers=" in done.stdout
    record = json.loads((tmp_path / "l/localize.json").read_text())
    assert record["facts"] + record["unknown"] == 12 and record["checked"] == 5
    assert "<svg" in (tmp_path / "l/localize.svg").read_text()
    printed = json.loads(excise(*arguments, "--json").stdout)
    assert printed["attributed"] == record["attributed"]


@pytest.mark.parametrize("concept, said", [
    ("builtin:declining", "states no facts to trace"),
    ("builtin:potion", "did you mean 'potions'"),
])  # fmt: skip
def test_what_cannot_be_traced_is_told_in_one_line(concept, said):
    done = excise("localize", SMALL_TESTBED, "--concept", concept)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_too_few_facts_are_an_error_and_not_an_average():
    job = prepare(SMALL_TESTBED, "builtin:potions", facts=2)
    with pytest.raises(RequestError, match="at least 5 are needed"):
        run(job, Events(), "cpu", "float32")
    assert torch.is_grad_enabled()
