import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(*command, **options):
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(arguments):
    pytest.importorskip("ruff")
    done = _run("ruff", *arguments, "--no-cache", str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_hold_in_the_four_folders_and_the_command_line(tmp_path):
    pytest.importorskip("mypy")
    # The repository's root is the package, so it is checked under the package's name.
    (tmp_path / "excise").symlink_to(ROOT)
    packages = [
        part
        for name in ("editing", "eval", "artifacts", "recipes", "commands", "cli")
        for part in ("-p", f"excise.{name}")
    ]
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    done = _run("mypy", *options, *packages, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_exactly_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("pip install -c constraints.txt")]
    assert len(commands) == 2
    assert "excise run orthogonalize" in commands[0] and "pytest" in commands[1]
