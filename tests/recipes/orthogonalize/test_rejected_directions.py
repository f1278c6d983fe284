"""A run whose candidate directions all fail the filters stops, and goes on only when asked."""

import json

import pytest
from helpers import SMALL_TESTBED, excise, with_settings

SHORT = [
    *("--model", SMALL_TESTBED),
    *with_settings("questions=20", "kl_prompts=4", "max_new_tokens=8", "validation_pairs=8", "min_induce=1000"),
]


def test_it_stops_with_what_failed_by_how_much_and_publishes_nothing(tmp_path):
    done = excise("run", "orthogonalize", "--out", tmp_path / "run", *SHORT)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "candidate directions passed" in line]
    assert "do not bring out the concept by min_induce=1000 (the most +" in line
    assert "too deep" in line and "use_rejected_direction=true" in line
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("asked", ["use_rejected_direction=true", "point=1"])
def test_it_goes_on_when_asked_and_says_which_filter_the_direction_failed(asked, tmp_path):
    out = tmp_path / "run"
    done = excise("run", "orthogonalize", "--out", out, *SHORT, "--set", asked, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["direction"]["passed_filters"] is False
    card = (out / "checkpoint" / "README.md").read_text()
    assert "The direction failed the filters: does not induce" in card
