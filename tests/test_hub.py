import json

import pytest
from conftest import excise
from excise.artifacts.models import find_model
from loopback_hub import COMMIT, serve

ID = "tester/base"


@pytest.fixture
def hub(tmp_path):
    with serve(ID, find_model("builtin:testbed").folder) as endpoint:
        yield {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }


def _dry_run(ref, environment):
    return excise("run", "orthogonalize", "--model", ref, "--dry-run", "--json", **environment)


@pytest.mark.parametrize("ref", [ID, f"{ID}@v1", f"{ID}@{COMMIT}"])
def test_a_hub_id_is_resolved_to_a_commit(ref, hub):
    done = _dry_run(ref, hub)
    assert done.returncode == 0, done.stderr
    base = json.loads(done.stdout)["base"]
    assert (base["kind"], base["name"], base["revision"]) == ("hub", ID, COMMIT)


@pytest.mark.parametrize("ref", [f"{ID}@v2", "tester/nothing"])
def test_what_the_hub_does_not_have_is_one_line(ref, hub):
    done = _dry_run(ref, hub)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub refused" in done.stderr and "404" in done.stderr


def test_a_model_in_the_cache_is_used_offline_at_its_commit(hub):
    assert _dry_run(ID, hub).returncode == 0
    done = _dry_run(ID, {**hub, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["revision"] == COMMIT
