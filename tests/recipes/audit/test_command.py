"""The command on an audit's page works when it is pasted; what is published names no folder of this machine."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from excise.artifacts.models.find import find_model
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.errors import RequestError
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.command import command
from helpers import excise, publish

PRUNED = PrunedUnits({0: (1, 2)}, {}, "down", "llama", 192, 8, 1)
"""An edit of the built-in model."""


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
    pasted, public = _commands("builtin:testbed-reference")
    assert pasted == public
    assert pasted.startswith(
        "excise audit builtin:testbed-reference --concept builtin:potions --base builtin:testbed --reference"
        " builtin:testbed-reference"
    )


def _recorded(folder, concept="builtin:potions", base="builtin:testbed", reference="builtin:testbed-reference"):
    """A run's folder with a record of what it was made from."""

    def described(name):
        return {"kind": "builtin" if name.startswith("builtin:") else "local", "name": name, "revision": None}

    record = {"schema_version": 2, "base": described(base), "concept": {"ref": concept}}
    if reference:
        record["reference"] = described(reference)
    publish(folder / "checkpoint", PRUNED, {"excise/eval.json": json.dumps(record)})
    return str(folder)


def test_a_run_names_its_own_base_concept_and_reference(tmp_path):
    run = _recorded(tmp_path / "run")
    plan = json.loads(excise("audit", run, "--dry-run", "--json").stdout)
    assert plan["models"] == {
        "base": "builtin:testbed",
        "edited": "run/checkpoint",
        "reference": "builtin:testbed-reference",
    }
    # What is set goes before what is recorded.
    other = audit.AuditSettings(model=run, base="builtin:testbed-reference").completed()
    assert (other.base, other.concept, other.reference) == (
        "builtin:testbed-reference",
        "builtin:potions",
        "builtin:testbed-reference",
    )
    assert other.completed() == other


def test_the_concept_of_a_run_is_never_taken_for_another(tmp_path):
    """A run that removed a way to behave is asked for that, though the built-in pack of potions has facts."""
    run = _recorded(tmp_path / "run", concept="builtin:declining", reference=None)
    plan = json.loads(excise("audit", run, "--dry-run", "--json").stdout)
    assert (
        plan["floor"] == "prompts without the concept" and "benign" in plan["attacks"] and "rtt" not in plan["attacks"]
    )
    assert plan["asked_at_each_look"] == {"held-out prompts": 60, "other prompts": 24}
    refused = excise("audit", run, "--attacks", "rtt", "--dry-run")
    assert refused.returncode == 2 and "rtt is no attack on a behaviour" in refused.stderr


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (
            {"concept": "landmarks"},
            "the concept of RUN was a local file or folder, landmarks; give its path with --concept",
        ),
        ({"base": "mine"}, "the base of RUN was a local file or folder, mine; give its path with --base"),
    ],
)
def test_what_a_record_names_only_in_part_is_asked_for(recorded, said, tmp_path):
    run = _recorded(tmp_path / "run", **recorded)
    done = excise("audit", run, "--dry-run")
    assert done.returncode == 2 and said.replace("RUN", run) in done.stderr
    given = {"concept": "builtin:potions", "base": "builtin:testbed"}
    words = [word for key in recorded for word in (f"--{key}", given[key])]
    assert excise("audit", run, *words, "--dry-run").returncode == 0


@pytest.mark.parametrize(("recipe", "setting"), [("repselect", "after"), ("distill", "teacher")])
def test_a_recipe_asks_for_the_base_of_a_run_by_its_own_option(recipe, setting, tmp_path):
    run = _recorded(tmp_path / "run", base="mine")
    done = excise("run", recipe, "--set", f"{setting}={run}", "--dry-run")
    assert done.returncode == 2 and "was a local file or folder, mine; give its path with --model" in done.stderr


def test_a_model_without_a_record_needs_its_concept_once_its_base_is_given(here):
    done = excise("audit", "runs/elm 1", "--base", "builtin:testbed", "--dry-run")
    assert done.returncode == 2 and "has no record of a run that names its concept; give --concept" in done.stderr


def test_a_base_is_not_audited_against_itself():
    done = excise("audit", "builtin:testbed", "--dry-run")
    assert done.returncode == 2 and "is also the base of this audit" in done.stderr
