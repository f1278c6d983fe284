"""A small seed of the fuzzer, and proof that it would see what it looks for."""

import time
from fnmatch import fnmatchcase

import pytest
from excise.editing.errors import RequestError
from fuzz import runner
from fuzz.accepted import ACCEPTED, BYTES, OF_VALUES
from fuzz.examples import EXAMPLES, Example
from fuzz.mutations import of_bytes, of_json
from fuzz.runner import accepted, fuzz, report


def test_damaged_files_are_refused_or_accepted_and_nothing_else():
    outcome = fuzz(seconds=60, seed=0, slow=False, most=300)
    assert outcome.unexpected == {}, "\n".join(report(outcome))
    assert sum(outcome.refused.values()) > 150 and sum(outcome.accepted.values()) > 20
    assert len(outcome.refused) > 15


def _reader(read):
    return Example(lambda folder: (folder / "a.json").write_text('{"a": 1}'), read, {"a.json": (of_json, of_bytes)})


def _text(folder):
    return (folder / "a.json").read_bytes()


@pytest.mark.parametrize(
    "read, kind",
    [
        (lambda folder: 1 / 0 if _text(folder) != b'{"a": 1}' else None, "ZeroDivisionError"),
        (lambda folder: time.sleep(9) if _text(folder) != b'{"a": 1}' else None, "hang over 0.2 s"),
    ],
)
def test_an_unexpected_error_and_a_hang_would_be_seen(monkeypatch, read, kind):
    monkeypatch.setattr(runner, "HANG", 0.2)
    monkeypatch.setitem(EXAMPLES, "broken", _reader(read))
    outcome = fuzz(seconds=20, seed=0, only=["broken"], most=3)
    ((found, reproductions),) = outcome.unexpected.items()
    assert found.startswith(f"broken/a.json: {kind}") and "case 0" in reproductions[0]
    assert any(line.startswith("UNEXPECTED") for line in report(outcome))


def test_a_message_of_two_lines_would_be_seen(monkeypatch):
    def read(folder):
        if _text(folder) != b'{"a": 1}':
            raise RequestError("one\ntwo")

    monkeypatch.setitem(EXAMPLES, "broken", _reader(read))
    assert [*fuzz(20, 0, ["broken"], most=3).unexpected] == ["broken/a.json: two lines"]


def test_a_damage_that_is_accepted_without_a_reason_would_be_seen(monkeypatch):
    monkeypatch.setitem(EXAMPLES, "broken", _reader(lambda folder: None))
    outcome = fuzz(20, 0, ["broken"], most=20)
    assert outcome.unexpected and all("broken/a.json: accepted without a reason" in kind for kind in outcome.unexpected)
    assert any("NO REASON" in line for line in accepted(outcome))
    reasons = {(*BYTES, *OF_VALUES): "nothing is read"}
    monkeypatch.setitem(ACCEPTED, "broken/*", reasons)
    outcome = fuzz(20, 0, ["broken"], most=20)
    assert not outcome.unexpected and all(line.endswith("nothing is read") for line in accepted(outcome))


def test_every_reason_belongs_to_a_reader_and_a_file_that_are_damaged():
    places = [f"{name}/{file}" for name, example in EXAMPLES.items() for file in example.files]
    assert [pattern for pattern in ACCEPTED if not any(fnmatchcase(place, pattern) for place in places)] == []
