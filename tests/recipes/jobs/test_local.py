"""Jobs on this machine: what is finished is not done again, what is cut short goes on, what fails holds up nobody."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from excise.artifacts.files.opened import sha256_of
from excise.editing.errors import RequestError
from excise.recipes.jobs import fork_server, local
from excise.recipes.jobs.engines import Local, Slurm, minutes_of, parse_engine, threads_each
from excise.recipes.jobs.job import Job, JobFolder
from excise.recipes.jobs.run import run_jobs
from helpers import SMALL_TESTBED, excise, started

SWEEP = f"""\
recipe: orthogonalize
model: {SMALL_TESTBED}
concept: builtin:potions
set:
  questions: 20
  kl_prompts: 2
  max_new_tokens: 2
seeds: [0, 1]
"""


def _when(ready, seconds=300):
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
    return value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local", "give the number of processes at once"),
        ("local:0", "give the number of processes at once"),
        ("locl:2", r"did you mean 'local'\?"),
        ("slurm:tim=3", r"no key 'tim' \(did you mean 'time'\?\); keys: partition, time, mem"),
        ("slurm:time", "'time' is not key=value; keys: partition"),
        ("slurm:time=soon", "time=soon is no time; give minutes, H:MM:SS or D-HH:MM:SS"),
        ("slurm:cpus=all", "cpus=all is no whole number above 0"),
    ],
)
def test_an_engine_that_is_none_is_answered_with_what_is_allowed(text, message):
    with pytest.raises(RequestError, match=message):
        parse_engine(text)


def test_slurm_without_its_commands_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"there is no sbatch here; .* or use local:N"):
        parse_engine("slurm")
    monkeypatch.setattr("excise.recipes.jobs.engines.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'excise\[jobs\]'"):
        parse_engine("slurm")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-02:30", 1590),
        ("1-02:30:01", 1591),
        ("0:59:30", 60),
    ],
)
def test_times_are_read_as_slurm_reads_them(text, minutes):
    assert minutes_of(text) == minutes and Slurm({"time": text}).minutes == minutes


def test_cores_are_shared_and_gpus_dealt_round(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = threads_each(1)
    assert parse_engine("local:3") == Local(3)
    assert threads_each(2) == max(1, cores // 2) and threads_each(10_000) == 1
    dealt = [local._environment(4, ["0", "3", "5"], slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert dealt == ["0", "3", "5", "0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in local._environment(2, ["0"], 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local._environment(1, [], 0)["OMP_NUM_THREADS"] == "1"


def test_a_failed_job_is_told_and_tried_again_and_a_finished_one_is_not(tmp_path, capsys):
    jobs = [Job(name, ("list", name), tmp_path, own_folder=False) for name in ("recipes", "nothing", "models")]
    for _ in range(2):
        ends = run_jobs(jobs, "local:2", tmp_path)
        assert [end.state for end in ends] == ["finished", "failed", "finished"]
    assert ends[1].error.startswith("nothing called 'nothing' to list")
    told = [line for line in capsys.readouterr().err.splitlines() if "nothing: failed: nothing called" in line]
    assert len(told) == 2 and all(line.endswith(f"log: {tmp_path / 'jobs' / 'nothing.log'}") for line in told)
    logs = {job.name: (tmp_path / "jobs" / f"{job.name}.log").read_text() for job in jobs}
    assert logs["nothing"].count("excise: ") == 2 and logs["recipes"].count("orthogonalize\t") == 1


def test_jobs_of_another_request_are_refused(tmp_path):
    run_jobs([Job("one", ("list", "recipes"), tmp_path, own_folder=False)], "local:1", tmp_path)
    with pytest.raises(RequestError, match=r"holds a job one of another command \(excise list recipes\)"):
        run_jobs([Job("one", ("list", "models"), tmp_path, own_folder=False)], "local:1", tmp_path)
    twice = [Job("two", ("list", "models"), tmp_path, own_folder=False)] * 2
    with pytest.raises(RequestError, match="the job 'two' exists twice"):
        run_jobs(twice, "local:1", tmp_path)


def test_a_job_that_is_killed_each_time_is_given_up(tmp_path, monkeypatch):
    """As the kernel does where memory ends."""
    (tmp_path / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "killed"))
    # The first time it is what jobs are copied from that is killed.
    monkeypatch.setattr(fork_server, "_started", [])
    (end,) = run_jobs([Job("one", ("list", "recipes"), tmp_path, own_folder=False)], "local:1", tmp_path, retries=2)
    assert (end.state, end.attempts, end.error) == ("failed", 3, "ended by signal 9")


def test_rests_of_a_start_that_wrote_nothing_are_no_obstacle(tmp_path):
    job = Job("one", ("run", "elm"), tmp_path / "one")
    assert job.arguments() == ["run", "elm", "--out", str(tmp_path / "one")]
    (tmp_path / "one" / ".work").mkdir(parents=True)
    job.clear_rests()
    assert not (tmp_path / "one").exists()
    (tmp_path / "one" / ".work").mkdir(parents=True)
    (tmp_path / "one" / ".work" / "settings.json").write_text("{}")
    job.clear_rests()
    assert job.arguments()[-1] == "--resume" and not job.is_complete()


def _sweep(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return started("sweep", "sweep.yaml", "--out", "sweep", "--jobs", "local:2", cwd=tmp_path, **pipes)


def _at_work(tmp_path, name):
    return (tmp_path / "sweep" / name / ".work" / "settings.json").is_file()


def test_a_sweep_with_a_killed_run_and_an_interrupt_ends_as_runs_alone_do(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    records = JobFolder(tmp_path / "sweep")
    first = _sweep(tmp_path)
    _when(lambda: _at_work(tmp_path, "seed=0") and _at_work(tmp_path, "seed=1"))
    os.kill(records.read("seed=0").process, signal.SIGKILL)
    _when(lambda: records.read("seed=0").attempts == 2 and records.read("seed=0").state == "running")
    second = excise("sweep", "sweep.yaml", "--out", "sweep", cwd=tmp_path)
    assert second.returncode == 2 and "another command is running the jobs in sweep" in second.stderr
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    again = "excise sweep sweep.yaml --out sweep --jobs local:2"
    assert first.returncode == 130 and said.endswith(f"the jobs were stopped. Continue with {again}\n"), said
    assert {records.read(name).state for name in records.names()} == {"stopped"}
    watched = excise("watch", "sweep", cwd=tmp_path)
    assert watched.returncode == 0 and watched.stdout.endswith("sweep: 2 stopped\n")

    last = _sweep(tmp_path)
    table, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    (line,) = results["combinations"]
    assert line["finished"] == [0, 1] and line["failed"] == {} and "forget V" in table
    plan = excise("sweep", "sweep.yaml", "--dry-run", cwd=tmp_path).stdout.splitlines()
    for seed in (0, 1):
        alone = tmp_path / f"alone-{seed}"
        words = re.findall(r"\S+", plan[-2 + seed])
        done = excise(*words[words.index("run") :], "--out", alone, "--json", OMP_NUM_THREADS="1")
        measured = {
            (m["name"], m["split"]): m["value"]
            for m in json.loads(done.stdout)["measurements"]
            if m["subject"] == "edited"
        }
        assert line["values"]["forget V"]["values"][seed] == measured["multiple_choice", "forget_V"]
        assert line["values"]["KL, neutral"]["values"][seed] == measured["kl_from_base", "neutral"]
        weights = Path("checkpoint") / "model.safetensors"
        assert sha256_of(alone / weights) == sha256_of(tmp_path / "sweep" / f"seed={seed}" / weights)

    # A third time nothing is left to do.
    logs = {name: records.log(name).read_bytes() for name in records.names()}
    assert excise("sweep", "sweep.yaml", "--out", "sweep", cwd=tmp_path).returncode == 0
    assert {name: records.log(name).read_bytes() for name in records.names()} == logs
