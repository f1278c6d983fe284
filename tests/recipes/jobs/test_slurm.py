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
from excise.recipes.search.request import recorded
from excise.recipes.search.study import NAME, Study, file_in, trial_folder
from excise.recipes.sweep import recipe as sweep
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise, in_fresh_process, with_settings
from slurm import NODES, cluster, daemons

__all__ = ["cluster", "daemons"]
SLURM = "slurm:time=30,mem=1000M"
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
        time.sleep(0.05)
    return value


def _is_at_work(folder, name):
    """Whether a job has begun to write its run."""
    return (folder / name / ".work" / "settings.json").is_file()


def test_a_killed_job_and_a_lost_node_lose_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOOK_SECONDS", 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    undisturbed = _sweep(tmp_path / "undisturbed", SLURM)
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
    disturbed = _sweep(out, SLURM)
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
    done = sweep.run(sweep.prepare(sweep.SweepSettings(**settings, out=out, jobs=SLURM)), "again")
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


def test_jobs_that_would_find_nothing_left_to_do_wait_for_no_node(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "LOOK_SECONDS", 1.0)
    jobs = [Job(name, ("list", "recipes"), tmp_path, own_folder=False) for name in ("one", "two")]
    for node in NODES:
        cluster.set_node(node, "drain")
    asked = []
    ends = run_jobs(jobs, SLURM, tmp_path, enough=lambda: bool(asked.append(None)) or len(asked) > 3)
    assert [(end.state, end.attempts, end.seconds) for end in ends] == [("finished", 0, 0.0)] * 2 and len(asked) == 4
    assert not cluster.ask("squeue", "--noheader", "--states=PENDING,RUNNING")
    assert capsys.readouterr().err.count("finished, nothing was left to do") == 2


def test_only_jobs_that_a_node_could_not_start_are_released(tmp_path, monkeypatch):
    """As SLURM 22.05 showed a job whose node came back while the job's processes still ran there."""
    queue = tmp_path / "squeue"
    queue.write_text(
        "#!/bin/sh\nprintf '4_1 launch failed requeued held\\n5 JobHeldUser\\n6 Resources\\n7_2 (null)\\n'\n"
    )
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert engine.failed_launches() == {"4_1"}


class Loss:
    """Cuts the power of a node, which stays off, once ``chosen`` names it."""

    def __init__(self, cluster, chosen):
        self.cluster, self.chosen, self.node = cluster, chosen, ""
        self.hand = threading.Thread(target=self._lose, daemon=True)

    def _lose(self):
        self.node = _when(self.chosen)
        self.cluster.lose(self.node)

    def __enter__(self):
        self.hand.start()
        return self

    def __exit__(self, *_):
        self.hand.join(60)
        assert self.node in NODES, "no node was lost"


def _timed(*words):
    began = time.monotonic()
    done = excise(*words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done, time.monotonic() - began


def _told(name, without, with_loss, capsys):
    with capsys.disabled():
        print(f"\n{name}: {without:.0f} s, with a node lost {with_loss:.0f} s, ratio {with_loss / without:.2f}")


def test_an_audit_whose_node_is_lost_is_the_audit_without(cluster, tmp_path, capsys):
    models = [SMALL_REFERENCE, "--base", SMALL_TESTBED, "--concept", "builtin:potions"]
    command = ["audit", *models, "--questions", "20", "--attacks", "few_shot,rtt", "--fresh", "--jobs", SLURM]
    _, without = _timed(*command, "--out", tmp_path / "undisturbed")
    out = tmp_path / "disturbed"

    def chosen():
        """The node of a part that trains."""
        places = cluster.running() if list((out / ".work" / "parts").glob("*rank.jsonl")) else {}
        at_work = [JobFolder(out / ".work").read(part.stem) for part in (out / ".work" / "parts").glob("*rank.jsonl")]
        return next((one.host for one in at_work if one.state == "running" and one.slurm in places), "")

    with Loss(cluster, chosen) as loss:
        done, with_loss = _timed(*command, "--out", out)
    assert (out / "audit.json").read_bytes() == (tmp_path / "undisturbed" / "audit.json").read_bytes()
    assert cluster.nodes.keys() == {*NODES} - {loss.node} and done.stderr.count("finished after") == 7
    _told("audit", without, with_loss, capsys)


TRIALS = 24
# Trials long enough to be hit.
SIZES = with_settings("kl_prompts=8", "max_new_tokens=12", "train_pairs=64", "validation_pairs=16", "questions=40")
SEARCH = ["search", "orthogonalize", "--model", SMALL_TESTBED, "--dtype", "float32", *SIZES, "--prompts", "6"]
SEARCH += ["--trials", TRIALS, "--jobs", SLURM, "--json"]


@functools.cache
def _storage(folder):
    import optuna

    return optuna.load_study(study_name=NAME, storage=file_in(folder))


def _asked(folder):
    """Every trial that a worker asked for, also those that were lost."""
    return _storage(folder).get_trials()


def _trials(folder):
    """What each trial drew and gave, and the hash of its edit, in the order in which they were asked for."""
    done = Study.of(recorded(folder)).done()
    return [(one.params, one.state, one.values, one.figures, _edit(folder, one.number)) for one in done]


def _edit(folder, number):
    return {path.name: sha256_of(path) for path in trial_folder(folder, number).iterdir()}


def _in_the_middle(folder):
    """A node that is in the middle of a trial, once a third of all trials ended."""
    if len(list((folder / "trials").glob("????"))) < TRIALS // 3:
        return ""
    trials = [one for one in _asked(folder) if one.state.name == "RUNNING"]
    # Since when each is at work; one that is just being asked for has not said so yet.
    since = {one.user_attrs["worker"][0]: one.user_attrs["seen"] for one in trials if "seen" in one.user_attrs}
    return next((host for host, began in since.items() if 0.1 < time.time() - began < 0.5), "")


def _front(done):
    return [one | {"trial": None} for one in json.loads(done.stdout)["front"]]


def test_a_search_whose_only_node_in_use_is_lost_is_the_search_without(cluster, tmp_path, capsys):
    whole, without = _timed(*SEARCH, "--workers", 1, "--out", tmp_path / "whole")
    # Also reads a study for the first time, which takes seconds.
    assert len(_asked(tmp_path / "whole")) >= TRIALS
    out = tmp_path / "lost"
    with Loss(cluster, lambda: _in_the_middle(out)):
        done, with_loss = _timed(*SEARCH, "--workers", 1, "--out", out)
    (record,) = [JobFolder(out / f"workers-{TRIALS}").read("worker-0")]
    assert record.attempts == 2 and record.host in cluster.nodes
    assert len(_trials(out)) == TRIALS and _trials(out) == _trials(tmp_path / "whole")
    assert _front(done) == _front(whole) != []
    # Of the trial that was lost in the middle nothing is left.
    assert len(list((out / "trials").iterdir())) == TRIALS
    _told("search, one worker", without, with_loss, capsys)


ALONE = """
import json, sys
from pathlib import Path
from excise.artifacts.events import Events
from excise.recipes.search.request import prepare
from excise.recipes.search.run import run
from excise.recipes.search.study import Study

folder, model, sizes, drawn = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(), json.loads(sys.argv[4])
flags = {"model": model, "dtype": "float32"}
request = prepare("orthogonalize", folder, assignments=sizes, flags=flags, trials=len(drawn), prompts=6)
for params in drawn:
    Study.of(request).study.enqueue_trial(params)
run(request, Events())
print("{}")
"""


def test_two_workers_of_whom_one_is_lost_end_every_trial_once_with_the_figures_of_one_process(
    cluster, tmp_path, capsys, monkeypatch
):
    """What two workers draw depends on who ends first, so it is each trial that is the same, and not the search."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, without = _timed(*SEARCH, "--workers", 2, "--out", tmp_path / "whole")
    # Also reads a study for the first time, which takes seconds.
    assert len(_asked(tmp_path / "whole")) >= TRIALS
    out = tmp_path / "lost"
    with Loss(cluster, lambda: _in_the_middle(out)) as loss:
        done, with_loss = _timed(*SEARCH, "--workers", 2, "--out", out)
    trials = _trials(out)
    assert sum(json.loads(done.stdout)["trials"].values()) == len(trials) == TRIALS
    assert len({json.dumps(params, sort_keys=True) for params, *_ in trials}) == TRIALS
    # One that both asked for at the end was nobody's.
    study = [one for one in _asked(out) if "worker" in one.user_attrs]
    hosts = {one.user_attrs["worker"][0] for one in study}
    (lost,) = [one for one in study if one.state.name == "FAIL"]
    assert hosts == {*NODES} and lost.user_attrs["worker"][0] == loss.node
    (again,) = [one for one in study if one.user_attrs.get("again") == lost.number]
    assert again.params == lost.params and again.state.name in ("COMPLETE", "PRUNED")
    words = " ".join(word for word in SIZES if word != "--set")
    alone = tmp_path / "alone"
    in_fresh_process(ALONE, alone, SMALL_TESTBED, words, json.dumps([params for params, *_ in trials]))
    for (params, _, _, figures, edit), (same, _, _, others, other_edit) in zip(trials, _trials(alone), strict=True):
        assert params == same and edit == other_edit
        # A trial may be left earlier in one order than in the other; what both measured is the same.
        for size in figures.keys() & others.keys():
            both = figures[size].keys() & others[size].keys()
            assert both and {name: figures[size][name] for name in both} == {name: others[size][name] for name in both}
    _told("search, two workers", without, with_loss, capsys)
