"""What version 1 wrote is read with today's names."""

import json

import pytest
from excise.artifacts.upgrade import RENAMED_SETTINGS, SCHEMA_VERSION, read_json, upgraded
from excise.editing.errors import RequestError

OLD = {
    "schema_version": 1,
    "never": {"kind": "builtin", "name": "builtin:testbed-never"},
    "measurements": [{"name": "multiple_choice", "split": "forget_V", "subject": "never", "value": 0.1}],
    "training": {"eta": 1.5, "steps": 400},
    "samples": [{"split": "concept", "prompt": "p", "base": "never", "edited": "comes_back"}],
    "run": {"recipe": "elm", "settings": {"eta": "auto", "reply_tokens": 24, "steps": 400}},
}


def test_an_old_eval_json_is_read_with_todays_names():
    content = upgraded(OLD)
    assert content["schema_version"] == SCHEMA_VERSION and "never" not in content
    assert content["reference"]["name"] == "builtin:testbed-reference"
    assert content["measurements"][0]["subject"] == "reference"
    assert content["training"] == {"strength": 1.5, "steps": 400}
    assert content["run"]["settings"] == {"strength": "auto", "max_new_tokens": 24, "steps": 400}
    # What a model said is not a name.
    assert content["samples"] == OLD["samples"]


def test_an_old_audit_is_read_with_todays_verdict_and_subjects():
    old = {
        "schema_version": 1,
        "verdict": "like_never_learned",
        "recalled": ["base", "never"],
        "controls": {"floor_is": "never"},
        "untouched": {"base": 1.0, "edited": 0.1, "never": 0.1},
        "settings": {"reply_tokens": 8},
        "attacks": [{"name": "rtt", "curve": [{"step": 0, "never": 0.1}], "rates": {"never": 0.1}}],
    }
    content = upgraded(old)
    assert content["verdict"] == "indistinguishable_from_never_trained" and content["reused"] == ["base", "reference"]
    assert content["untouched"]["reference"] == 0.1 and content["controls"]["floor_is"] == "reference"
    assert content["attacks"][0] == {
        "name": "rtt",
        "curve": [{"step": 0, "reference": 0.1}],
        "rates": {"reference": 0.1},
    }
    assert content["settings"] == {"max_new_tokens": 8}


def test_content_of_today_is_left_alone():
    today = {**OLD, "schema_version": SCHEMA_VERSION}
    assert upgraded(today) is today


def test_no_name_is_both_old_and_new():
    assert not set(RENAMED_SETTINGS) & set(RENAMED_SETTINGS.values())


@pytest.mark.parametrize("version", [3, "2", None, True, 0])
def test_a_record_of_an_unknown_version_is_refused(version, tmp_path):
    path = tmp_path / "audit.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "verdict": "recovers"}))
    assert read_json(path)["verdict"] == "recovers"
    path.write_text(json.dumps({"schema_version": version, "verdict": "recovers"}))
    with pytest.raises(RequestError, match="this excise reads 1 to 2"):
        read_json(path)
