"""A base is measured once: the next run takes its figures, bit for bit, and nothing else is taken for them."""

import json
import shutil

import pytest
import torch
from excise.recipes.common.base_figures import BaseFigures
from helpers import SMALL_TESTBED, excise, with_settings

SMALL = with_settings("questions=4", "kl_prompts=2", "max_new_tokens=2", "steps=2", "batch_size=2")


def _run(out, *words, **environment):
    done = excise("run", "grad_diff", "--model", SMALL_TESTBED, "--out", out, *SMALL, *words, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "checkpoint" / "excise" / "eval.json").read_text()), done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("figures")
    environment = {"XDG_CACHE_HOME": str(place / "cache")}
    first, told = _run(place / "first", **environment)
    return place, environment, first, told


def test_a_second_run_takes_the_figures_of_the_first_and_says_so(runs):
    place, environment, first, told = runs
    assert "measured by an earlier run" not in told and "measure base" in told
    second, told = _run(place / "second", **environment)
    assert "the base was measured by an earlier run; --set fresh=true measures it again" in told
    assert "measure base" not in told
    assert second == first


def test_another_setting_or_fresh_measures_again(runs):
    place, environment, first, _ = runs
    _, told = _run(place / "longer", *with_settings("max_new_tokens=3"), **environment)
    assert "measure base" in told
    fresh, told = _run(place / "fresh", *with_settings("fresh=true"), **environment)
    assert "measure base" in told and fresh == first


def test_half_of_a_pack_is_another_pack(runs):
    place, environment, _, _ = runs
    half, told = _run(place / "half", *with_settings("items=search"), **environment)
    assert "measure base" in told
    other, told = _run(place / "other", *with_settings("items=report"), **environment)
    assert "measure base" in told and other["measurements"] != half["measurements"]


def test_what_is_damaged_is_measured_again(runs):
    place, environment, first, _ = runs
    for path in (place / "cache" / "excise" / "base-figures").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    again, told = _run(place / "again", **environment)
    assert "measure base" in told and again == first


def test_distributions_come_back_bit_for_bit_and_too_many_are_not_kept(tmp_path, monkeypatch):
    from dataclasses import replace

    from excise.artifacts.checkpoints.tensor_cache import TensorCache
    from excise.artifacts.concepts import load_concept
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_model
    from excise.eval.model_under_test import EvalSettings, ModelUnderTest
    from excise.recipes.common import base_figures
    from excise.recipes.common.base_figures import Measured

    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    concept = load_concept("builtin:potions")
    concept = replace(concept, prompts=concept.prompts[:3] + concept.prompts[-3:], retain=concept.retain[:40])
    subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, EvalSettings(3, 2, 2))
    measured = Measured([], {"neutral": subject.replies("neutral")}, subject.baseline())
    figures = BaseFigures(TensorCache(tmp_path / "kept", "this"))
    figures.keep(measured)
    known = figures.recall()
    assert known.replies == measured.replies and known.baseline.prompts == measured.baseline.prompts
    for one, other in zip(known.baseline.text_distributions, measured.baseline.text_distributions, strict=True):
        assert torch.equal(one.log_p, other.log_p) and one.ids is None and one.vocabulary == other.vocabulary
    assert BaseFigures(TensorCache(tmp_path / "kept", "another")).recall() is None
    monkeypatch.setattr(base_figures, "LARGEST", 100)
    less = BaseFigures(TensorCache(tmp_path / "small", "this"))
    less.keep(measured)
    assert less.recall() is None


def test_a_runs_weights_are_summed_once_for_its_record_and_its_caches(tmp_path, monkeypatch):
    """The record of inputs, the base's figures and the teacher's states all go by them, and a large model takes minutes."""
    from excise.artifacts.checkpoints.tensor_cache import scope_of
    from excise.artifacts.concepts import load_concept
    from excise.artifacts.files import opened
    from excise.artifacts.models.find import find_model
    from excise.recipes.common.run_inputs import checksums
    from excise.recipes.unlearning.grad_diff import GradDiffSettings

    shutil.copytree(SMALL_TESTBED, tmp_path / "model")
    summed, whole = [], opened._summed
    monkeypatch.setattr(opened, "_summed", lambda file: (summed.append(file.name), whole(file))[1])
    source = find_model(str(tmp_path / "model"))
    before = checksums(GradDiffSettings(), {"the base": source}, load_concept("builtin:potions"))
    scope = scope_of(source.folder, torch.float32, torch.device("cpu"))
    assert summed.count("model.safetensors") == 1
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checksums(GradDiffSettings(), {"the base": source}, load_concept("builtin:potions")) != before
    assert scope_of(source.folder, torch.float32, torch.device("cpu")) != scope
    assert summed.count("model.safetensors") == 2
