"""Jobs on a real SLURM cluster of two nodes on this machine, with jobs killed and nodes lost."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from excise.artifacts.files.opened import sha256_of
from excise.editing.errors import ExciseError
from excise.recipes.jobs import slurm as engine
from excise.recipes.jobs.job import Job, JobFolder
from excise.recipes.jobs.run import run_jobs
from excise.recipes.sweep import recipe as sweep
from helpers import SMALL_TESTBED
from slurm import cluster

__all__ = ["cluster"]
# Long enough to be hit while it works, on a quick machine too.
SMALL = {"questions": 60, "kl_prompts": 32, "max_new_tokens": 24, "train_pairs": 128}
SEEDS = [0, 1, 2]


def _sweep(out, jobs):
    settings = {"recipe": "orthogonalize", "model": SMALL_TESTBED, "concept": "builtin:potions", "set": SMALL}
    job = sweep.prepare(sweep.SweepSettings(**settings, seeds=SEEDS, out=out, jobs=jobs))
    return sweep.run(job, "excise sweep again")


def _weights(out):
    return [sha256_of(out / f"seed={seed}" / "checkpoint" / "model.safetensors") for seed in SEEDS]


def _when(ready, seconds=240):
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)
    return value


def _is_at_work(folder, name):
    """Whether a job has begun to write its run."""
    return (folder / name / ".work" / "settings.json").is_file()


def test_a_killed_job_and_a_lost_node_lose_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOOK_SECONDS", 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    undisturbed = _sweep(tmp_path / "undisturbed", "slurm:time=30,mem=1000M")
    first_seconds = time.monotonic() - started
    out = tmp_path / "disturbed"
    harm = {}

    def disturb():
        _when(lambda: _is_at_work(out, "seed=0") and _is_at_work(out, "seed=1"))
        numbers = json.loads((out / "jobs" / "submitted.json").read_text())["numbers"]
        running = cluster.running()
        cluster.ask("scancel", numbers["seed=0"])
        node = running[numbers["seed=1"]]
        cluster.set_node(node, "down")
        harm.update(killed=numbers["seed=0"], node=node)
        time.sleep(5)
        cluster.set_node(node, "resume")

    hand = threading.Thread(target=disturb, daemon=True)
    hand.start()
    started = time.monotonic()
    disturbed = _sweep(out, "slurm:time=30,mem=1000M")
    second_seconds = time.monotonic() - started
    hand.join(10)
    assert harm["node"] in ("n1", "n2") and not undisturbed.failed and not disturbed.failed
    attempts = {outcome.job.name: outcome.attempts for outcome in disturbed.outcomes}
    assert attempts["seed=0"] >= 2 and attempts["seed=1"] >= 2 and attempts["seed=2"] == 1
    assert {outcome.attempts for outcome in undisturbed.outcomes} == {1}
    assert disturbed.as_json() == undisturbed.as_json()
    assert _weights(out) == _weights(tmp_path / "undisturbed")
    print(f"undisturbed {first_seconds:.0f} s, disturbed {second_seconds:.0f} s")


def test_a_job_that_fails_by_itself_is_not_submitted_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOOK_SECONDS", 1.0)
    jobs = [Job("good", ("list", "recipes"), tmp_path, own_folder=False)]
    jobs.append(Job("bad", ("list", "nothing"), tmp_path, own_folder=False))
    good, bad = run_jobs(jobs, "slurm:time=5,mem=500M", tmp_path)
    assert (good.state, bad.state, bad.attempts) == ("finished", "failed", 1)
    assert bad.error.startswith("nothing called 'nothing' to list") and bad.log.read_text().count("excise: ") == 1


def test_what_the_cluster_refuses_is_one_line(cluster, tmp_path):
    with pytest.raises(ExciseError, match=r"SLURM took no job: .*partition") as caught:
        run_jobs([Job("one", ("list", "recipes"), tmp_path, own_folder=False)], "slurm:partition=nowhere", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_job_that_slurm_wants_off_its_node_is_requeued_and_goes_on(cluster, tmp_path, monkeypatch):
    """The signal that SLURM sends before a time limit, or when it preempts."""
    monkeypatch.setattr(engine, "LOOK_SECONDS", 1.0)
    out = tmp_path / "sweep"

    def preempt():
        _when(lambda: _is_at_work(out, "seed=0"))
        cluster.ask("scancel", "--signal=USR2", *cluster.running())

    hand = threading.Thread(target=preempt, daemon=True)
    hand.start()
    settings = {"recipe": "orthogonalize", "model": SMALL_TESTBED, "concept": "builtin:potions", "set": SMALL}
    done = sweep.run(sweep.prepare(sweep.SweepSettings(**settings, out=out, jobs="slurm:time=30,mem=1000M")), "again")
    assert not done.failed and done.outcomes[0].attempts == 2
    log = done.outcomes[0].log.read_text()
    assert log.count("interrupted; no partial checkpoint was left") == 1
    submitted = json.loads((out / "jobs" / "submitted.json").read_text())["numbers"]
    # The same job of SLURM's, not another one.
    assert JobFolder(out).read("seed=0").slurm == submitted["seed=0"]


def test_a_command_that_is_left_finds_its_jobs_again(cluster, tmp_path):
    """Ctrl-C leaves them to the cluster; the same command takes them up, and submits none twice."""
    code = (
        "import sys; from pathlib import Path; from excise.recipes.jobs.job import Job;"
        "from excise.recipes.jobs import run, slurm; run.SECOND_THOUGHT = 0.1; slurm.LOOK_SECONDS = 1.0;"
        "out = Path(sys.argv[1]); jobs = [Job(f'{n}', ('architecture', 'builtin:testbed'), out, own_folder=False)"
        " for n in range(3)];"
        "ends = run.run_jobs(jobs, 'slurm:time=5,mem=500M', out); print([(o.state, o.attempts) for o in ends])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    # A test session in the background ignores interrupts, and its processes would too.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    left = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ), preexec_fn=heard)
    _when((tmp_path / "jobs" / "submitted.json").is_file)
    left.send_signal(signal.SIGINT)
    _, said = left.communicate(timeout=60)
    assert "the jobs go on. Follow them with excise watch" in said and "scancel" in said
    numbers = (tmp_path / "jobs" / "submitted.json").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert again.stdout.strip() == str([("finished", 1)] * 3), again.stderr
    assert (tmp_path / "jobs" / "submitted.json").read_text() == numbers


def test_only_jobs_that_a_node_could_not_start_are_released(tmp_path, monkeypatch):
    """As SLURM 22.05 showed a job whose node came back while the job's processes still ran there."""
    queue = tmp_path / "squeue"
    queue.write_text(
        "#!/bin/sh\nprintf '4_1 launch failed requeued held\\n5 JobHeldUser\\n6 Resources\\n7_2 (null)\\n'\n"
    )
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert engine.failed_launches() == {"4_1"}
