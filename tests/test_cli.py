import gc
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from excise import __version__
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.manifest import amend_folder
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.artifacts.progress import PlainLines
from excise.cli import LIBRARIES
from excise.editing.errors import RequestError
from excise.recipes.chat import recorded_base
from excise.recipes.commands import session
from excise.recipes.commands.failures import Interrupted, explained, interruptible
from excise.recipes.commands.help import PANELS
from excise.recipes.commands.lists import KINDS
from helpers import (
    SMALL_TESTBED,
    excise,
    in_fresh_process,
    publish,
    publish_small,
    random_edit,
    run_on_knowledge,
    started,
    with_settings,
)
from safetensors import SafetensorError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "ortogonalize"], "did you mean 'orthogonalize'"),
        (["run", "orthogonalize", "--set", "varient=plain"], "did you mean 'variant'"),
        (["run", "orthogonalize", "--model", "builtin:testbd"], "did you mean 'testbed'"),
        (["run", "orthogonalize", "--concept", "nowhere/"], "not a folder"),
        (["run", "orthogonalize", "--set", "layers=90"], "selects nothing in a model of 8 layers"),
        (["run", "orthogonalize", "--device", "cuda:77"], "does not exist"),
        (["run", "orthogonalize", "--config", "missing.yaml"], "cannot be read"),
        (["run", "orthogonalize", "--resume"], "give --out"),
        (["run", "orthogonalize", "--sed", "3"], "No such option"),
        (["list", "recipies"], "did you mean 'recipes'"),
        (["verify", "nowhere"], "is not a folder"),
        (["eval", "./nowhere", "--concept", "builtin:declining"], "no model folder"),
        (["frobnicate"], "No such command"),
        (["run", "elm", "--steps", "60"], "--steps is a setting: use --set steps=60"),
        (["run", "elm", "--eta=2"], "--eta is a setting: use --set strength=2"),
        (["eval", "builtin:testbed", "--kl-prompts", "8"], "--kl-prompts is a setting: use --set kl_prompts=8"),
        (["audit", "builtin:testbed", "--never", "x"], "--never is now called --reference"),
        (["testbed", "build", "--out", "w", "--no-never"], "--no-never is now called --no-reference"),
        (["eval", "builtin:testbed"], "concept is missing; give --concept"),
        (["eval", "builtin:testbed", "--set", "concpt=x"], "did you mean 'concept'"),
        (["audit", "builtin:testbed", "--set", "budgt=long"], "did you mean 'budget'"),
        (
            ["inspect", "x", "--model", "builtin:testbed", "--latents", "x"],
            "--latents: 'x' is not a comma-separated list of integers, e.g. 3,17",
        ),
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


@pytest.mark.parametrize("what", [*KINDS, "elm", "audit", "eval"])
def test_lists_are_whole_lines_without_padding_and_need_no_torch(what):
    code = (
        "import sys; from excise.cli import app; app(args=['list', sys.argv[1]], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) >= 2 and all(line == line.rstrip(" ") and "  " not in line for line in lines)
    assert len({line.count("\t") for line in lines}) == 1
    assert done.returncode == 0, done.stderr


def test_a_recipe_is_listed_with_its_settings_and_what_is_neither_is_refused():
    listed = {line["setting"]: line["default"] for line in json.loads(excise("list", "prune", "--json").stdout)}
    assert listed["score"] == "attribution" and listed["concept"] == "builtin:potions"
    table = excise("list", "prune").stdout
    assert len(table.splitlines()) == len(listed) and "One of attribution, mean_attribution" in table
    wrong = excise("list", "prun")
    assert wrong.returncode == 2 and "did you mean 'prune'?" in wrong.stderr


def test_a_background_job_that_ignores_the_interrupt_is_still_terminated(tmp_path):
    process = started(
        *("run", "orthogonalize", "--out", tmp_path / "run"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "events.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    last = stderr.splitlines()[-1]
    assert last.startswith("excise: interrupted; no partial checkpoint was left.")
    assert last.endswith(f"Continue with: excise run orthogonalize --out {tmp_path / 'run'} --resume")


def test_an_interrupt_within_compiled_text_ends_with_the_code_of_an_interrupt(tmp_path):
    """Libraries run texts while they are imported; ``python -m`` then ends by the signal unless the mark is cleared."""
    (tmp_path / "stopped.py").write_text(
        "import sys\nfrom excise import cli\n"
        "def stop(**_): exec('raise KeyboardInterrupt')\n"
        "cli.app = stop\nsys.argv = ['excise', 'list']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "excise: interrupted; nothing was written\n")


def test_an_interrupt_while_an_object_is_destroyed_is_not_lost(tmp_path):
    """Python prints and ignores what is raised there, so that a run which was stopped went on to its end."""
    (tmp_path / "stopped.py").write_text(
        "import os, signal, sys, time\nfrom excise import cli\n"
        "class Thing:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(0.01)\n"
        "def work(**_):\n    Thing()\n    time.sleep(20)\n    print('went on to its end')\n"
        "cli.app = work\nsys.argv = ['excise', 'list']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "excise: interrupted; nothing was written\n")


def test_an_interrupt_is_one_line_and_the_run_can_go_on(tmp_path):
    out = tmp_path / "run"
    small = with_settings("questions=20", "kl_prompts=4", "max_new_tokens=8")
    arguments = ("run", "orthogonalize", "--model", SMALL_TESTBED, "--out", out, *small)
    process = started(
        *arguments,
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
    assert stderr.splitlines()[-1].endswith(f"Continue with: excise run orthogonalize --out {out} --resume")
    assert not (out / "checkpoint").exists()
    assert excise(*arguments).returncode == 2
    other = excise("run", "orthogonalize", "--out", out, "--resume", "--seed", "5")
    assert other.returncode == 2 and "other values of seed" in other.stderr
    resumed = excise("run", "orthogonalize", "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert excise("verify", out).returncode == 0
    assert not (out / ".work").exists()


def test_a_bare_command_prints_help_and_the_version_has_a_flag():
    alone, asked = excise(), excise("--help")
    assert (alone.returncode, alone.stdout) == (0, asked.stdout) and alone.stderr == ""
    assert [panel for panel in PANELS if f"{panel}:" not in alone.stdout] == []
    assert excise("--version").stdout == f"excise {__version__}\n"


def test_an_interrupt_names_the_folder_that_excise_chose_and_promises_nothing_where_nothing_was_written(tmp_path):
    begun = tmp_path / "runs" / "elm-1"
    (begun / ".work").mkdir(parents=True)
    (begun / ".work" / "settings.json").write_text("{}")
    command = ["excise", "run", "elm", "--out", str(begun), "--resume"]
    with pytest.raises(Interrupted, match=f"Continue with: excise run elm --out {begun} --resume$") as stopped:
        with interruptible(begun, command):
            raise KeyboardInterrupt
    assert explained(stopped.value, [])[1] == 130
    with pytest.raises(Interrupted, match="Nothing was written"), interruptible(tmp_path / "none", command):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_is_told_as_one_whichever_library_met_it(error):
    line, code = explained(error, [])
    assert line.startswith("the disk is full; no partial checkpoint was left.") and code == 1
    assert explained(type(error)(5, "other trouble"), [])[0] != line


def test_batch_jobs_get_a_line_a_stage_and_one_now_and_then_within_it():
    stream = io.StringIO()
    watcher = PlainLines(stream, seconds=0.05)
    watcher.start("measure base", 600)
    watcher.advance(120, {"loss": 0.5})
    time.sleep(0.3)
    watcher.stop()
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("  measure base") and len(rest) >= 2
    assert rest[-1].endswith("  measure base: 120 of 600, loss 0.5")


def test_one_folder_of_a_run_is_taken_wherever_a_model_is(tmp_path):
    run = tmp_path / "mine"
    edit = random_edit(open_checkpoint(find_model("builtin:testbed").folder).config)
    publish(run / "checkpoint", edit)
    assert find_model(str(run)) == find_model(str(run / "checkpoint"))
    assert excise("verify", run).returncode == 0
    assert "tensors differ" in excise("diff", "builtin:testbed", run, "--no-spectrum").stdout
    assert recorded_base(run) == "builtin:testbed"
    save_edit(edit, tmp_path / "edit")
    amend_folder(
        run / "checkpoint", {f"excise/{path.name}": path.read_bytes() for path in (tmp_path / "edit").iterdir()}
    )
    for folder in (run, run / "checkpoint", run / "checkpoint" / "excise"):
        assert load_edit(folder).method == edit.method


def test_commands_that_train_nothing_wait_for_no_trainer(tmp_path):
    """Importing transformers' trainer takes seconds, which nobody who looks at a checkpoint should wait."""
    run = tmp_path / "mine"
    publish_small(run / "checkpoint")
    commands = [
        ["verify", run],
        ["card", run],
        ["diff", "builtin:testbed", run, "--no-spectrum"],
        ["push", run, "me/mine", "--dry-run"],
        ["pull", "me/mine", "--out", tmp_path / "pulled"],
    ]
    codes, modules = _one_after_the_other(commands)
    # All did their work, but for the pull, which finds no Hub.
    assert codes == [0, 0, 0, 0, 2] and {"torch", "huggingface_hub"} <= set(modules)
    assert not set(modules) & {"transformers.trainer", "transformers.modeling_utils", "peft", "datasets"}


def test_chat_answers_each_line_of_stdin_with_base_and_edited(tmp_path):
    run = tmp_path / "mine"
    publish(run / "checkpoint", random_edit(open_checkpoint(find_model("builtin:testbed").folder).config))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    chat = started("chat", run, "--max-new-tokens", "4", "--device", "cpu", text=True, **pipes)
    said, errors = chat.communicate("Who is it?\n\nWhy?\n/quit\nno\n", timeout=300)
    lines = [line for line in said.splitlines() if line]
    assert chat.returncode == 0, errors
    assert [line.split("  ")[0] for line in lines] == ["> Who is it?", "base", "edited", "> Why?", "base", "edited"]


def test_the_base_of_a_local_model_has_to_be_given(tmp_path):
    manifest = {"schema_version": 2, "files": {}, "base": {"kind": "local", "name": "mine", "revision": None}}
    (tmp_path / "excise").mkdir()
    (tmp_path / "excise" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match="was the local model mine; give its folder with --base"):
        recorded_base(tmp_path)


def test_commands_that_only_read_records_load_no_torch(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for place in (run, other):
        run_on_knowledge(place)
    commands = [
        ["card", run],
        ["report", run, "--out", tmp_path / "report.html"],
        ["watch", run],
        ["compare", run, other, "--out", tmp_path / "compared"],
        ["concept", "show", "builtin:potions"],
        ["concept", "new", tmp_path / "pack"],
        ["list", "elm"],
    ]
    codes, modules = _one_after_the_other(commands)
    assert codes == [0] * len(commands)
    assert not set(modules) & {"torch", "transformers", "peft", "datasets"}


def _one_after_the_other(commands):
    """Exit codes of commands in one process, and all modules that they loaded."""
    code = (
        "import json, sys; from contextlib import redirect_stdout; from excise.cli import main\n"
        "codes = []\n"
        "with redirect_stdout(sys.stderr):\n"
        "    for sys.argv in json.loads(sys.argv[1]):\n"
        "        try: codes.append(main() or 0)\n"
        "        except SystemExit as stop: codes.append(stop.code or 0)\n"
        "print(json.dumps([codes, [*sys.modules]]))"
    )
    words = json.dumps([["excise", *map(str, command)] for command in commands])
    codes, modules = in_fresh_process(code, words, cold=True)
    return codes, modules


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}])
def test_what_libraries_read_is_set_before_they_are_imported_unless_the_user_said_otherwise(given):
    """How soon threads that wait sleep, that the Hub's client reports nothing, that forks need no warning."""
    script = (
        "import json, os, sys; from excise import cli; sys.argv = ['excise', '--version'];"
        "cli._divide = lambda _: print(json.dumps([{name: os.environ.get(name) for name in cli.LIBRARIES},"
        " [name in sys.modules for name in ('torch', 'huggingface_hub', 'tokenizers')]])); cli.main()"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in LIBRARIES}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**inherited, **given})
    held, imported = json.loads(done.stdout.splitlines()[0])
    assert held == {**LIBRARIES, **given} and not any(imported), done.stderr


def test_garbage_is_looked_for_as_usual_once_libraries_are_imported():
    usual = gc.get_threshold()
    try:
        session.rarely_collect()
        assert gc.get_threshold()[0] > 10 * usual[0]
        session.settle()
        assert gc.get_threshold() == session.COLLECTED
    finally:
        gc.set_threshold(*usual)
