"""The command on an audit's page works when it is pasted; what is published names no folder of this machine."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from excise.artifacts.models.find import find_model
from excise.editing.errors import RequestError
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.command import command
from helpers import excise


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's working directory with a run in it."""
    home = tmp_path / "ada"
    folder = home / "work"
    shutil.copytree(find_model("builtin:testbed-reference").folder, folder / "runs" / "elm 1" / "checkpoint")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "home", lambda: home)
    return folder


def _commands(model, **settings):
    job = audit.prepare(audit.AuditSettings(model=str(model), out=Path("audit"), questions=20, **settings))
    return command(job), command(job, public=True)


@pytest.mark.parametrize("typed", ["runs/elm 1/checkpoint", "./runs/elm 1/checkpoint", "ABSOLUTE"])
def test_a_pasted_command_finds_the_run_again(here, typed):
    model_folder = here / "runs" / "elm 1" / "checkpoint"
    model = model_folder if typed == "ABSOLUTE" else typed
    pasted, public = _commands(model, seed=3, attacks=("rtt", "few_shot"), dtype="float32")
    words = shlex.split(pasted)
    assert words[:2] == ["excise", "audit"] and Path(words[2]).resolve() == model_folder
    assert not Path(words[2]).is_absolute() and str(here) not in pasted and "ada" not in pasted
    # In public it has the name by which its card calls it.
    assert shlex.split(public)[2] == "elm 1/checkpoint" and shlex.split(public)[3:] == words[3:]
    assert find_model(words[2]).folder.resolve() == model_folder
    with pytest.raises(RequestError):
        find_model(shlex.split(public)[2])


def test_the_whole_command_is_taken_by_the_command_line(here):
    pasted, _ = _commands("runs/elm 1/checkpoint", seed=3, attacks=("rtt", "few_shot"), dtype="float32")
    done = excise(*shlex.split(pasted)[1:], "--out", "again", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["attacks"] == ["rtt", "few_shot"]


def test_a_neighbouring_folder_is_named_from_the_working_directory(here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    pasted, _ = _commands(here / "runs" / "elm 1" / "checkpoint")
    assert shlex.split(pasted)[2] == "../runs/elm 1/checkpoint"


def test_a_folder_of_somebody_else_keeps_only_its_public_name(here, monkeypatch, tmp_path):
    (tmp_path / "bob").mkdir()
    monkeypatch.chdir(tmp_path / "bob")
    pasted, public = _commands(here / "runs" / "elm 1" / "checkpoint")
    assert pasted == public and "ada" not in pasted and "bob" not in pasted


def test_built_in_models_keep_their_names(here):
    pasted, public = _commands("builtin:testbed")
    assert pasted == public
    assert pasted.startswith(
        "excise audit builtin:testbed --concept builtin:potions --base builtin:testbed --reference"
        " builtin:testbed-reference"
    )
