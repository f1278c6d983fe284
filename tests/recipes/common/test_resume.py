"""A run that was killed goes on as it was begun, or says in one line what is no longer so."""

import shutil

import pytest
from excise.artifacts.concepts import BUILTIN
from excise.artifacts.events import Events
from excise.artifacts.files.written import read_sealed, write_sealed
from excise.editing.errors import RequestError
from excise.recipes.common.run_folder import STARTED, resumed
from excise.recipes.unlearning import recipe
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from excise.recipes.unlearning.npo import NpoSettings
from helpers import SMALL_TESTBED, excise, with_settings

SMALL = {"steps": 2, "batch_size": 2, "questions": 4, "kl_prompts": 2, "max_new_tokens": 2}


class KilledAt:
    """A terminal whose user presses Ctrl-C when a stage begins."""

    def __init__(self, stage):
        self.stage = stage

    def start(self, stage, total):
        if stage == self.stage:
            raise KeyboardInterrupt

    def advance(self, steps, metrics):
        pass

    def stop(self):
        pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a pack, a base and a run on them that was killed before its export."""
    place = tmp_path_factory.mktemp("begun")
    shutil.copytree(BUILTIN / "potions", place / "pack")
    shutil.copytree(SMALL_TESTBED, place / "base")
    settings = _settings(place)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(recipe.prepare(settings), Events(watcher=KilledAt("export")))
    return place


@pytest.fixture
def place(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "place")
    return tmp_path / "place"


def _go_on(place, **settings):
    chosen = resumed(_settings(place, **settings), "grad_diff")
    return recipe.run(recipe.prepare(chosen, resume=True), Events())


def _settings(place, kind=GradDiffSettings, **more):
    values = {"model": str(place / "base"), "concept": str(place / "pack"), "out": place / "run", **SMALL, **more}
    return kind(**values)


def _refused(place, told, **settings):
    with pytest.raises(RequestError, match=told) as caught:
        _go_on(place, **settings)
    assert "\n" not in str(caught.value) and not (place / "run" / "checkpoint").exists()


def test_an_untouched_run_ends_in_the_bytes_of_one_that_was_not_killed(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    killed = _go_on(tmp_path).out / "checkpoint" / "model.safetensors"
    whole = recipe.run(recipe.prepare(_settings(tmp_path, out=tmp_path / "whole")), Events()).out
    assert killed.read_bytes() == (whole / "checkpoint" / "model.safetensors").read_bytes()


def test_another_recipe_does_not_go_on_with_the_run(place):
    with pytest.raises(RequestError, match="is of grad_diff, not of npo; go on with grad_diff"):
        resumed(_settings(place, NpoSettings), "npo")
    # Nor where the settings were given whole, as from Python.
    with pytest.raises(RequestError, match="is of grad_diff, not of npo"):
        recipe.run(recipe.prepare(_settings(place, NpoSettings), resume=True), Events())
    done = excise("run", "npo", "--resume", "--out", place / "run", *with_settings("beta=0.1"))
    assert done.returncode == 2 and "is of grad_diff, not of npo" in done.stderr


def test_other_settings_do_not_go_on_with_the_run(place):
    with pytest.raises(RequestError, match="other settings: rank, seed changed since"):
        recipe.run(recipe.prepare(_settings(place, rank=3, seed=5), resume=True), Events())


@pytest.mark.parametrize("file", ["pack/questions.jsonl", "pack/concept.yaml"])
def test_a_pack_that_changed_since_is_refused(place, file):
    path = place / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1] if file.endswith("jsonl") else [*lines, "phrases: [new]"]) + "\n")
    _refused(place, "other inputs: the concept pack changed since")


def test_a_base_that_changed_since_is_refused(place):
    data = bytearray((place / "base" / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (place / "base" / "model.safetensors").write_bytes(data)
    _refused(place, "other inputs: the base changed since")


@pytest.mark.parametrize(
    "file",
    ["edit/edit.safetensors", "edit/edit.json", "learned.json", "logits.pt", "adapter/adapter_model.safetensors"],
)
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_what_was_learned_is_taken_as_it_was_written_or_not_at_all(place, file, how):
    path = place / "run" / ".work" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    if how != "gone":
        path.write_bytes(data[:50] if how == "cut" else data)
    _refused(place, f"{path} {'is gone' if how == 'gone' else 'was changed'} since the run wrote it")


@pytest.mark.parametrize("file", ["settings.json", "edit/seal.json"])
def test_a_damaged_record_of_the_run_is_refused(place, file):
    path = place / "run" / ".work" / file
    text = path.read_text()
    for damaged in (text[: len(text) // 2], text.replace("grad_diff", "npo").replace('"logits.pt"', '"logits"'), "[]"):
        path.write_text(damaged)
        _refused(place, f"{path} cannot be read .*remove .* and start it again")
    path.unlink()
    _refused(place, f"{path} cannot be read")


def test_settings_that_no_longer_exist_are_refused(place):
    path = place / "run" / ".work" / STARTED
    content = read_sealed(path)
    write_sealed(path, {**content, "settings": {**content["settings"], "left_over": 1}})
    _refused(place, "was begun by another version of excise")
    write_sealed(path, {key: value for key, value in content.items() if key != "recipe"})
    _refused(place, "recipe: field required")
