import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import excise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "ortogonalize"], "did you mean 'orthogonalize'"),
        (["run", "orthogonalize", "--set", "varient=plain"], "did you mean 'variant'"),
        (["run", "orthogonalize", "--model", "builtin:testbd"], "did you mean 'testbed'"),
        (["run", "orthogonalize", "--concept", "nowhere/"], "not a folder"),
        (["run", "orthogonalize", "--set", "layers=90"], "selects nothing in a model of 8 layers"),
        (["run", "orthogonalize", "--device", "cuda:77"], "not there"),
        (["run", "orthogonalize", "--config", "missing.yaml"], "cannot be read"),
        (["run", "orthogonalize", "--resume"], "give --out"),
        (["run", "orthogonalize", "--sed", "3"], "No such option"),
        (["list", "recipies"], "did you mean 'recipes'"),
        (["verify", "nowhere"], "is not a folder"),
        (["eval", "./nowhere", "--concept", "builtin:declining"], "no model folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_says_what_to_do(arguments, message, tmp_path):
    done = excise(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    done = excise("run", "ortogonalize", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_dry_run_says_what_would_be_touched_and_writes_nothing(tmp_path):
    done = excise("run", "orthogonalize", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert (plan["tensors_to_change"], plan["tensors"], plan["gradient_steps"]) == (17, 74, 0)
    assert plan["bytes_to_change"] < plan["bytes_to_write"] and plan["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["recipes", "measurements", "architectures", "concepts", "models"])
def test_lists_are_not_empty(what):
    done = excise("list", what)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 1


def test_a_recipe_is_listed_with_its_settings_and_what_is_neither_is_refused():
    listed = {line["setting"]: line["default"] for line in json.loads(excise("list", "prune", "--json").stdout)}
    assert listed["score"] == "attribution" and listed["concept"] == "builtin:potions"
    table = excise("list", "prune").stdout
    assert len(table.splitlines()) == len(listed) + 1 and "One of attribution, mean_attribution" in table
    wrong = excise("list", "prun")
    assert wrong.returncode == 2 and "did you mean 'prune'?" in wrong.stderr


def test_a_background_job_that_ignores_the_interrupt_is_still_terminated(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "excise.cli", "run", "orthogonalize", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "events.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("\n") == 1 and "--resume" in stderr


def test_an_interrupt_is_one_line_and_the_run_can_go_on(tmp_path):
    out = tmp_path / "run"
    arguments = ["run", "orthogonalize", "--out", str(out), "--set", "questions=40"]
    code = "import sys; from excise.cli import main; sys.argv = ['excise', *sys.argv[1:]]; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Started from a background job, a process ignores the interrupt; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    events = out / "events.jsonl"
    deadline = time.monotonic() + 600
    while not (events.exists() and "score candidates" in events.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.count("\n") == 1 and "--resume" in stderr
    assert not (out / "checkpoint").exists()
    assert excise(*arguments).returncode == 2
    other = excise("run", "orthogonalize", "--out", out, "--resume", "--seed", "5")
    assert other.returncode == 2 and "another seed" in other.stderr
    resumed = excise("run", "orthogonalize", "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert excise("verify", out).returncode == 0
    assert not (out / ".work").exists()
