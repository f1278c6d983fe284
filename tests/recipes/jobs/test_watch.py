"""Watching reads files alone: of runs that go on, have ended, were killed, or are no runs."""

import json
import subprocess
import sys
import time

import pytest
from excise.artifacts.event_log import gather_events, last_stage
from excise.artifacts.events import Events
from excise.artifacts.files.locks import Lock, is_held
from excise.editing.errors import RequestError
from excise.recipes.jobs import watch as watching
from excise.recipes.jobs.board import LineBoard, TableBoard
from excise.recipes.jobs.job import Job, JobFolder
from excise.recipes.jobs.status import Row, rows_of
from helpers import excise


def _run_in(folder, lines=()):
    (folder / ".work").mkdir(parents=True)
    (folder / ".work" / "settings.json").write_text("{}")
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _event(stage, step, ago=1.0, **metrics):
    return {"time": time.time() - ago, "stage": stage, "step": step, "metrics": metrics}


def test_the_last_stage_is_read_whatever_stands_around_it(tmp_path):
    path = tmp_path / "events.jsonl"
    assert last_stage(path) is None
    many = [_event("load base", 0, 900, total=None), *(_event("train", n, 800, loss=1.0) for n in range(3000))]
    lines = [
        json.dumps(line) for line in [*many, _event("measure edited", 0, 5, total=40), _event("measure edited", 7)]
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"time": 17, "stage": "measu\xff')
    stage = last_stage(path)
    assert (stage.name, stage.step, stage.total) == ("measure edited", 7, 40)
    assert stage.elapsed == pytest.approx(899, abs=1) and path.stat().st_size > 2 * (1 << 16)
    path.write_bytes(b"\x00\xff no event at all")
    assert last_stage(path) is None


def test_a_run_is_running_while_its_process_holds_the_folder(tmp_path):
    out = tmp_path / "run"
    _run_in(out, [_event("train", 0, 30, total=100), _event("train", 42)])
    assert [row.state for row in rows_of(out)] == ["stopped"]
    code = (
        "import sys, time; from pathlib import Path; from excise.artifacts.files.locks import Lock;"
        "lock = Lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out / ".work" / "lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        (row,) = rows_of(out)
        assert (row.state, row.stage, row.step, row.total) == ("running", "train", 42, 100)
        assert Lock.take(out / ".work" / "lock") is None and is_held(out / ".work" / "lock")
    finally:
        # As a crash ends it: nothing is left to be cleaned up.
        holder.kill()
        holder.wait()
    assert [row.state for row in rows_of(out)] == ["stopped"]


def test_a_folder_of_runs_is_one_table_and_no_run_is_one_line(tmp_path):
    _run_in(tmp_path / "one", [_event("train", 0)])
    _run_in(tmp_path / "two", [_event("train", 0)])
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "audit.json").write_text('{"schema_version": 2, "verdict": "recovers"}')
    assert {row.name: row.state for row in rows_of(tmp_path)} == {
        "one": "stopped",
        "two": "stopped",
        "three": "finished",
    }
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no run"), (tmp_path / "none", "is no folder")):
        done = excise("watch", folder)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_jobs_that_nobody_runs_any_more_are_stopped(tmp_path):
    records = JobFolder(tmp_path)
    jobs = [Job(name, ("list", "recipes"), tmp_path / name) for name in ("dead", "waits")]
    records.register(jobs)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    records.begin(jobs[0])
    records.update("dead", process=process.pid)
    assert [row.state for row in rows_of(tmp_path)] == ["stopped", "stopped"]
    lock = Lock.take(tmp_path / "jobs" / ".lock")
    assert [row.state for row in rows_of(tmp_path)] == ["stopped", "waiting"]
    lock.release()


def test_each_change_is_one_line_of_json_until_all_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.0)
    looks = iter(
        [
            [Row("a", "running", "load base"), Row("b", "waiting")],
            [Row("a", "running", "load base"), Row("b", "waiting")],
            [Row("a", "finished"), Row("b", "running", "starts")],
            [Row("a", "finished"), Row("b", "failed", error="it broke")],
        ]
    )
    monkeypatch.setattr(watching, "rows_of", lambda folder: next(looks))
    said = []
    watching.watch_as_json(tmp_path, said.append)
    changes = [(line["name"], line["state"]) for line in map(json.loads, said)]
    assert changes == [("a", "running"), ("b", "waiting"), ("a", "finished"), ("b", "running"), ("b", "failed")]


def test_a_folder_that_goes_away_for_a_moment_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.0)
    calls = []

    def rows(folder):
        calls.append(folder)
        if len(calls) in (2, 3):
            raise RequestError("gone")
        return [Row("a", "running" if len(calls) < 4 else "finished")]

    monkeypatch.setattr(watching, "rows_of", rows)
    assert [look[0].state for look in watching.looks(tmp_path)] == ["running"] * 3 + ["finished"]


def test_boards_say_each_change_once_and_the_error_of_what_failed(tmp_path):
    path = tmp_path / "lines"
    with path.open("w") as stream, LineBoard(stream) as board:
        for _ in range(3):
            board.show([Row("a", "running", "starts"), Row("b", "failed", error="no disk", log="b.log")], ["a note"])
    lines = [line.split("  ")[1] for line in path.read_text().splitlines()]
    assert lines == ["a note", "a: starts", "b: failed: no disk; log: b.log"]
    with path.open("w") as stream, TableBoard(stream) as board:
        long = "attack edited: " + ", ".join(["relearn"] * 20)
        board.show([Row(f"job-{n}", "waiting") for n in range(200)] + [Row("at-work", "running", long, 3, 9)])
    shown = path.read_text()
    # A narrow terminal cuts the end of a long stage, and shows the step nevertheless.
    assert (
        "at-work" in shown
        and "3/9 attack" in shown
        and long not in shown
        and "201 jobs: 1 running, 200 waiting" in shown
    )


def test_events_of_parts_are_gathered_in_the_order_of_their_times(tmp_path):
    for name in ("one", "two"):
        Events(tmp_path / f"{name}.jsonl").write(name, 0, {"total": None})
        time.sleep(0.01)
    gather_events([tmp_path / "two.jsonl", tmp_path / "one.jsonl", tmp_path / "none.jsonl"], tmp_path / "all.jsonl")
    assert [json.loads(line)["stage"] for line in (tmp_path / "all.jsonl").read_text().splitlines()] == ["one", "two"]
