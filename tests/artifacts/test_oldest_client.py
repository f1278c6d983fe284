"""The oldest Hub client that excise allows pushes and pulls as the newest does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from excise.artifacts.checkpoints.manifest import verify_folder
from helpers import excise, in_fresh_process, publish_small
from loopback_hub import client, folder_files, hub

ID = "tester/edited"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """A folder with the lowest version that pyproject.toml allows, to stand before the installed one."""
    low = re.search(r'"huggingface-hub>=([\d.]+)', PROJECT.read_text())[1]
    folder = tmp_path_factory.mktemp("client")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"huggingface-hub=={low}.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"huggingface-hub {low}.0 cannot be fetched here")
    return str(folder), f"{low}.0"


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    return publish_small(tmp_path_factory.mktemp("edited") / "checkpoint")


@pytest.mark.parametrize("xet", [False, True])
def test_the_oldest_client_pushes_and_pulls(xet, oldest, edited, tmp_path, monkeypatch):
    path, version = oldest
    monkeypatch.setenv("PYTHONPATH", path)
    assert in_fresh_process("import huggingface_hub, json; print(json.dumps(huggingface_hub.__version__))") == version
    with hub() as known:
        environment = client(known, tmp_path / "hf", xet=xet)
        for words in (["push", edited, ID], ["push", edited, ID], ["pull", ID, "--out", tmp_path / "pulled"]):
            done = excise(*words, **environment)
            assert done.returncode == 0, done.stderr
        assert sum("/commit/" in line for line in known.requests) == 1
    assert folder_files(tmp_path / "pulled") == folder_files(edited) and verify_folder(tmp_path / "pulled") > 4
