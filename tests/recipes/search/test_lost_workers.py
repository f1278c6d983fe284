"""Trials of workers that were lost with their machine: done again at once, with the same values, and by one other alone."""

import json
import subprocess
import sys
import time

import pytest
from excise.recipes.common.search_space import Dimension
from excise.recipes.search import study as studies
from excise.recipes.search.figures import Figure, Objective
from excise.recipes.search.study import Study, trial_folder, work_folder

SPACE = {"strength": Dimension(0.0, 1.0), "layers": Dimension(1, 24)}
LOST = """
import json, runpy, socket, sys, time
from pathlib import Path
socket.gethostname = lambda: "another-machine"
worker = runpy.run_path(sys.argv[1])["study"](Path(sys.argv[2]))
with worker.at_work():
    trial, values = worker.ask(40)
    print(json.dumps(values), flush=True)
    time.sleep(600)
"""


def study(folder):
    perplexity = Figure("retain perplexity", "perplexity", "retain")
    return Study(f"sqlite:///{folder}/study.db", SPACE, [Objective(perplexity, "min")], [], 0, 40, folder)


@pytest.fixture
def elsewhere(tmp_path):
    """A worker of another machine that is in the middle of a trial, and the values of that trial."""
    command = [sys.executable, "-c", LOST, __file__, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, "it did not start"
        yield process, json.loads(line)
    finally:
        process.kill()
        process.wait()


def test_a_trial_of_a_lost_machine_is_done_again_at_once_and_by_one_worker(elsewhere, tmp_path):
    process, values = elsewhere
    one, two = study(tmp_path), study(tmp_path)
    with one.at_work(), two.at_work():
        # While it lives its trial is its own.
        assert (one.running(), one.redo_what_was_killed()) == (1, 0)
        trial, others = one.ask(40)
        assert others != values and one.running() == 2
        one.tell(trial, "complete", [0.5], {"settings": {}})
        rests = [trial_folder(tmp_path, 0), work_folder(trial_folder(tmp_path, 0))]
        for rest in rests:
            rest.mkdir(parents=True)
        process.kill()
        process.wait()
        assert one.running() == two.running() == 0
        again, new = two.ask(40), one.ask(40)
        assert again[1] == values and new[1] not in (values, others)
        assert again[0].user_attrs["again"] == 0 and not any(rest.exists() for rest in rests)
        for trial, _ in (again, new):
            one.tell(trial, "complete", [0.5], {"settings": {}})
        assert [done.number for done in one.done()] == [1, 2, 3] and one.running() == 0
    # A lost worker's lock goes with it, and those that ended took theirs.
    assert [path.name for path in (tmp_path / studies.LOCKS).iterdir()] == ["asking"]


def test_a_worker_that_was_taken_for_lost_adds_no_second_result(tmp_path, monkeypatch, caplog):
    """As on a file system without locks, after an hour."""
    monkeypatch.setattr(studies, "is_held", lambda path: None)
    slow, other = study(tmp_path), study(tmp_path)
    trial, values = slow.ask(40)
    trial.set_user_attr("worker", ["another-machine", 1])
    assert other.redo_what_was_killed() == 0
    trial.set_user_attr("seen", time.time() - studies.GONE_AFTER - 1)
    # It had begun to tell of an error, which came from its loss perhaps.
    trial.set_user_attr(studies.ERROR, "no disk")
    assert other.redo_what_was_killed() == 1
    slow.tell(trial, "complete", [0.1], {"settings": {}})
    assert "trial 0 was given up for lost" in caplog.text and slow.done() == []
    again, same = other.ask(40)
    other.tell(again, "complete", [0.2], {"settings": {}})
    assert same == values and [one.values for one in slow.done()] == [(0.2,)]
