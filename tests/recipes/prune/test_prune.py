"""Pruning end to end, through the command line, on the built-in model; in small, neurons share too much."""

import json

import pytest
from helpers import excise, with_settings


def test_pruning_hurts_the_concept_more_than_its_controls_do(tmp_path):
    short = with_settings("questions=40", "kl_prompts=4", "max_new_tokens=6", "examples=120", "validate_units=8")
    done = excise("run", "prune", "--out", tmp_path / "run", "--json", *short)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    found = results["pruning"]["controls"]
    lost = {name: found[name]["neighbour"]["value"] - found[name]["forget_T"]["value"] for name in found}
    assert lost["chosen"] > 0.1 > max(lost["random"], lost["largest"])
    assert results["edited"]["tensors_changed"] == sum(n > 0 for n in results["pruning"]["by_layer"])
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "## Controls" in card and "| random units |" in card and "; random units " in card
    assert excise("verify", tmp_path / "run").returncode == 0


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["share=0"], "prune nothing"),
        (["semantics=mean"], "has no bias to which the mean"),
        (["semantics=mean", "heads_share=0.1"], "heads have no bias"),
        (["semantics=remove", "heads_share=0.1"], "cuts MLP neurons only"),
        (["score=attribtion"], "attribution"),
    ],
)
def test_a_wrong_setting_is_one_line(pairs, said):
    done = excise("run", "prune", "--dry-run", *with_settings(*pairs))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
