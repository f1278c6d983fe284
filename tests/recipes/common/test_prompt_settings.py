"""How prompts were rendered is part of a run's record, and whoever goes on from it renders them so too."""

import json

import pytest
from excise.artifacts.files.parsed import read_json
from excise.editing.errors import RequestError
from excise.recipes.audit.request import AuditSettings
from excise.recipes.common.run_record import inputs_of
from excise.recipes.common.settings import load_settings
from excise.recipes.orthogonalize.recipe import OrthogonalizeSettings
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise, run_once, with_settings

SMALL = with_settings("questions=8", "validation_pairs=4", "kl_prompts=4", "max_new_tokens=8")
FORM = {"date": "2026-03-05", "thinking": False, "response_prefix": "Well,", "template": {}}


@pytest.fixture(scope="module")
def run():
    models = ("--model", SMALL_TESTBED, *with_settings(f"reference={SMALL_REFERENCE}"))
    words = with_settings("date=2026-03-05", "response_prefix=Well,")
    return run_once("orthogonalize", "--concept", "builtin:potions", *models, *SMALL, *words)


def test_the_record_says_how_prompts_were_rendered(run):
    out, results = run
    assert results["prompts"] == {**FORM, "chat_template": True}
    manifest = read_json(out / "checkpoint" / "excise" / "manifest.json")
    assert {key: manifest["run"]["settings"][key] for key in FORM} == FORM
    assert "--set date=2026-03-05 --set response_prefix=Well," in results["run"]["command"]


def test_an_audit_of_the_run_renders_its_prompts_so(run):
    out, _ = run
    assert inputs_of(str(out)).prompts == FORM
    named = {"concept": "builtin:potions", "base": SMALL_TESTBED}
    settings = AuditSettings(model=str(out), **named).completed()
    assert settings.date == "2026-03-05" and settings.response_prefix == "Well,"
    other = AuditSettings(model=str(out), date="2024-02-29", **named).completed()
    assert other.date == "2024-02-29" and other.response_prefix == "Well,"


def test_an_evaluation_of_the_run_renders_its_prompts_so(run):
    out, _ = run
    words = ("--concept", "builtin:potions", "--questions", 4, *with_settings("max_new_tokens=4", "kl_prompts=2"))
    done = excise("eval", out, *words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompts"]["response_prefix"] == "Well,"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["date=05/03/2026"], "is no date; write YYYY-MM-DD"),
        (["template.messages=x"], "the program sets it itself"),
        (["template=yes"], "template: got 'yes'"),
        (["thinkin=true"], "unknown key 'thinkin' (did you mean 'thinking'?)"),
    ],
)
def test_a_wrong_format_is_one_line(words, told):
    with pytest.raises(RequestError) as caught:
        load_settings(OrthogonalizeSettings, None, words)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_variable_that_the_base_does_not_know_stops_a_run_before_its_weights():
    done = excise("run", "orthogonalize", "--model", SMALL_TESTBED, "--dry-run", *with_settings("template.deep=true"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "knows no such variable" in done.stderr
