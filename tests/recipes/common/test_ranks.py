"""Of several processes that a launcher starts, one works and writes, and the others stop at once with a line."""

import os
import subprocess

import pytest
from excise.editing.errors import RequestError
from excise.recipes.common.ranks import rank_and_size, refuse_ranks, work_alone
from helpers import SMALL_TESTBED, with_settings
from warm import warm_interpreter


def _launched(*words):
    launcher = [warm_interpreter(), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "excise.cli", *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=500)


def test_two_processes_of_torchrun_make_one_run(tmp_path):
    small = with_settings("steps=2", "questions=4", "kl_prompts=2", "max_new_tokens=4")
    done = _launched("run", "grad_diff", "--model", SMALL_TESTBED, "--out", tmp_path / "run", "--json", *small)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
    # Results come from one process only.
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.count("process 0 of 2 works alone") == 1 and done.stderr.count("process 1 of 2 stops") == 1


def test_the_process_that_works_ends_the_launcher_with_its_line():
    done = _launched("eval", "no/such/folder")
    assert done.returncode != 0 and done.stderr.count("excise: no/such/folder") == 1
    assert "unexpected" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3"}, (3, 4)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, 2)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, (0, 8)),
        # A batch script without srun is one process, whatever was asked for.
        ({"SLURM_NTASKS": "8"}, (0, 1)),
        ({"WORLD_SIZE": "many"}, (0, 1)),
    ],
)
def test_launchers_are_known_by_their_variables(variables, expected):
    assert rank_and_size(variables) == expected
    works, sentence = work_alone(variables)
    assert works == (expected[0] == 0) and bool(sentence) == (expected[1] > 1)
    # The training library would wait for processes that have stopped.
    assert not works or rank_and_size(variables) == (0, 1)


def test_a_program_that_calls_the_package_is_refused(monkeypatch):
    refuse_ranks()
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="start the program without a launcher"):
        refuse_ranks()
