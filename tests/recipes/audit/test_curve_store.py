"""Curves are reused by the same code alone."""

import shutil

import numpy as np
import pytest
from excise.artifacts.checkpoints.tensor_cache import TensorCache
from excise.artifacts.files.written import write_sealed
from excise.editing.errors import RequestError
from excise.recipes.audit.curve_store import COMPUTES, PACKAGE, UNTOUCHED, AttackCurves, CurveStore, code_digest
from excise.recipes.common import run_inputs


@pytest.fixture
def package(tmp_path):
    """A copy of the code that decides what an attack measures."""
    for part in COMPUTES:
        shutil.copytree(PACKAGE / part, tmp_path / "package" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "package"


def _digest(package):
    run_inputs.code_digest.cache_clear()
    return code_digest(package)


@pytest.mark.parametrize(
    "place",
    ["recipes/audit/attacks/inputs.py", "recipes/common/trainer.py", "editing/training/adapters.py", "eval/concept.py"],
)
def test_a_change_in_a_sub_folder_is_other_code(package, place):
    before = _digest(package)
    assert before == _digest(package) == _digest(PACKAGE)
    file = package / place
    file.write_text(file.read_text() + "\nSTEPS = 61\n")
    assert _digest(package) != before


def test_code_that_moves_to_the_next_file_is_other_code_and_what_is_no_code_is_not(package):
    before = _digest(package)
    (package / "recipes" / "audit" / "notes.md").write_text("nothing that is computed")
    assert _digest(package) == before
    first, second = sorted((package / "recipes" / "audit").glob("*.py"))[1:3]
    text, last = first.read_text()[:-10], first.read_text()[-10:]
    first.write_text(text)
    second.write_text(last + second.read_text())
    assert _digest(package) != before


def _store(folder, cache, digest):
    return CurveStore(folder, TensorCache(cache, digest))


def test_curves_are_reused_under_the_same_digest_and_not_under_another(package, tmp_path):
    curves = AttackCurves.of_one_point([1.0, 0.0, 1.0])
    cache, digest = tmp_path / "cache", _digest(package)
    first = _store(tmp_path / "first", cache, digest)
    first.put("base", "int4", curves)
    first.put("edited", "int4", curves)
    assert first.reused() == []
    same = _store(tmp_path / "same", cache, digest)
    for subject in ("base", "edited"):
        same.reuse(subject, "int4")
    # The edited model is never taken from an earlier audit.
    assert same.has("base", "int4") and not same.has("edited", "int4") and same.reused() == ["base"]
    assert np.array_equal(same.get("base", "int4").only.hits, curves.only.hits)
    file = package / "recipes" / "audit" / "attacks" / "weights.py"
    file.write_text(file.read_text() + "\n")
    other = _store(tmp_path / "other", cache, _digest(package))
    other.reuse("base", "int4")
    assert not other.has("base", "int4") and other.reused() == []


def test_curves_of_attacks_that_trained_beside_others_are_other_curves(tmp_path):
    cache = tmp_path / "cache"
    _store(tmp_path / "first", cache, "x").put("base", "rtt", AttackCurves.of_one_point([1.0]), ("rtt", "few_8"))
    alone = _store(tmp_path / "second", cache, "x")
    alone.reuse("base", "rtt", ("rtt",))
    assert not alone.has("base", "rtt")
    alone.reuse("base", "rtt", ("rtt", "few_8"))
    assert alone.has("base", "rtt")


def _written(folder):
    store = CurveStore(folder)
    store.put("edited", UNTOUCHED, AttackCurves.of_one_point([1.0, 0.0, 1.0]))
    store.put("edited", "int4", AttackCurves.of_one_point([1.0, 0.0, 0.0]))
    return store, folder / "edited-int4.json"


def test_curves_come_back_as_they_were_put(tmp_path):
    store, _ = _written(tmp_path)
    assert store.get("edited", "int4").only.hits.tolist() == [[[1.0, 0.0, 0.0]]]
    # What could not be asked has no value, and a difference of shares can be below 0.
    store.put("edited", "probe", AttackCurves.of_one_point([1.0, float("nan"), -0.5]))
    assert np.array_equal(store.get("edited", "probe").only.hits, [[[1.0, np.nan, -0.5]]], equal_nan=True)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda text: text.replace("[1.0, 0.0, 0.0]", "[1.0, 0.0]"), "was changed since it was written"),
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "it holds a list, not a JSON object"),
    ],
)
def test_curves_that_were_changed_since_decide_nothing(tmp_path, change, told):
    store, path = _written(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(RequestError, match=f"edited-int4.json cannot be read .*{told}.*remove this file") as caught:
        store.get("edited", "int4")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "hits, told",
    [
        ([[[1.0, 0.0]]], "does not count the 3 questions"),
        ([[[1.0, 0.0, 2.0]]], "by_rate.0.hits.0.0.2: input should be less than or equal to 1"),
        ([[[1.0, 0.0, True]]], "by_rate.0.hits.0.0.2: input should be a valid number"),
        ([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], "not one for each seed, step and question"),
        ([[[1.0, 0.0, 0.0]], [[1.0, 0.0]]], "not one for each seed, step and question"),
        ([], "not one for each seed, step and question"),
    ],
)
def test_curves_of_another_length_are_refused_whoever_sealed_them(tmp_path, hits, told):
    store, path = _written(tmp_path)
    curve = {"rate": 0.0, "steps": [0], "tokens": [0], "hits": hits}
    write_sealed(path, {"diverged": 0, "by_rate": [curve]})
    with pytest.raises(RequestError, match=told):
        store.get("edited", "int4")


@pytest.mark.parametrize(("key", "value"), [("rate", -1.0), ("steps", [-1]), ("tokens", [-1])])
def test_curves_along_negative_steps_tokens_or_rates_are_refused(tmp_path, key, value):
    store, path = _written(tmp_path)
    curve = {"rate": 0.0, "steps": [0], "tokens": [0], "hits": [[[1.0, 0.0, 0.0]]], key: value}
    write_sealed(path, {"diverged": 0, "by_rate": [curve]})
    with pytest.raises(RequestError, match=rf"by_rate.0.{key}.*greater than or equal to 0"):
        store.get("edited", "int4")


def test_a_damaged_entry_of_the_cache_is_measured_again(tmp_path):
    cache = tmp_path / "cache"
    _store(tmp_path / "first", cache, "x").put("base", "int4", AttackCurves.of_one_point([1.0]))
    (entry,) = cache.glob("*.safetensors")
    data = entry.read_bytes()
    entry.write_bytes(data.replace(b"[[[1.0]]]", b"[[[0.0]]]"))
    assert data != entry.read_bytes()
    store = _store(tmp_path / "second", cache, "x")
    store.reuse("base", "int4")
    assert not store.has("base", "int4")
