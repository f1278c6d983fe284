"""A model that says nothing is measured and shown like any other, and what has no value is named."""

import json

import pytest
import torch
from excise.artifacts.reporting.card import write_card
from excise.artifacts.reporting.findings import findings
from excise.artifacts.reporting.report import write_report
from helpers import SMALL_TESTBED, excise, run_on_knowledge, with_settings
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def mute(tmp_path):
    """A model of which all logits are equal, so that the first token of the vocabulary, the end, is its argmax."""
    model = AutoModelForCausalLM.from_pretrained(SMALL_TESTBED, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert model.config.eos_token_id == 0
    model.save_pretrained(tmp_path / "mute")
    AutoTokenizer.from_pretrained(SMALL_TESTBED).save_pretrained(tmp_path / "mute")
    return tmp_path / "mute"


def test_it_is_measured_and_what_has_no_value_is_named(mute):
    small = with_settings("questions=8", "kl_prompts=4", "max_new_tokens=4")
    words = ["eval", mute, "--base", SMALL_TESTBED, "--concept", "builtin:potions", *small]
    done = excise(*words, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    values = {(m["name"], m["split"], m["subject"]): m["value"] for m in results["measurements"]}
    assert values["degenerate_share", "concept", "edited"] == 1
    assert ("reverse_perplexity", "concept", "base") in values
    assert ("reverse_perplexity", "concept", "edited") not in values
    (warning,) = [line for line in results["warnings"] if "reverse" not in line and "(concept)" in line]
    assert warning.startswith("Not measured on the edited model: ") and "items could be scored" in warning
    shown = excise(*words).stdout
    assert "Not measured on the mute: " in shown


def test_card_and_report_of_a_run_can_do_without_it(tmp_path):
    results = run_on_knowledge(tmp_path / "run")
    rest = [m for m in results["measurements"] if (m["name"], m["subject"]) != ("reverse_perplexity", "edited")]
    results = {**results, "measurements": rest, "warnings": ["Not measured on the edited model: it."]}
    assert len(rest) < len(run_on_knowledge(tmp_path / "again")["measurements"])
    assert "Not measured on the edited model: it." in findings(results)
    write_card(tmp_path, results, [])
    write_report(tmp_path / "report.html", results, [])
    assert "Not measured on the edited model" in (tmp_path / "README.md").read_text()
