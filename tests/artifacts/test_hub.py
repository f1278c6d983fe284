import json

import pytest
from excise.artifacts.models.find import find_model
from helpers import excise
from loopback_hub import client, folder_files
from loopback_hub import hub as running_hub

ID = "tester/base"


@pytest.fixture
def hub(tmp_path):
    with running_hub() as known:
        commit = known.add(ID, folder_files(find_model("builtin:testbed").folder))
        yield client(known, tmp_path / "hf"), commit


def _dry_run(ref, environment):
    return excise("run", "orthogonalize", "--model", ref, "--dry-run", "--json", **environment)


@pytest.mark.parametrize("suffix", ["", "@v1", "@COMMIT"])
def test_a_hub_id_is_resolved_to_a_commit(suffix, hub):
    environment, commit = hub
    done = _dry_run(ID + suffix.replace("COMMIT", commit), environment)
    assert done.returncode == 0, done.stderr
    base = json.loads(done.stdout)["base"]
    assert (base["kind"], base["name"], base["revision"]) == ("hub", ID, commit)


@pytest.mark.parametrize("ref", [f"{ID}@v2", "tester/nothing"])
def test_what_the_hub_does_not_have_is_one_line(ref, hub):
    done = _dry_run(ref, hub[0])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub refused" in done.stderr and "404" in done.stderr


def test_a_model_in_the_cache_is_used_offline_at_its_commit(hub):
    environment, commit = hub
    assert _dry_run(ID, environment).returncode == 0
    done = _dry_run(ID, {**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["revision"] == commit
