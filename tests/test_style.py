import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from excise.editing.errors import counted

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
        part for name in ("editing", "eval", "artifacts", "recipes", "cli") for part in ("-p", f"excise.{name}")
    ]
    # What it finds out is not written down: nobody asks again.
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
    done = _run("mypy", *options, *packages, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_exactly_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("pip install -c constraints.txt")]
    assert len(commands) == 2
    assert "excise run orthogonalize" in commands[0] and "pytest" in commands[1]


def _name(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def _installed(requirements, extras):
    """Names that pip is asked for, with those of the extras that an extra names."""
    for requirement in requirements:
        own = re.fullmatch(r"excise\[(.*)\]", requirement)
        if own:
            for extra in own[1].split(","):
                yield from _installed(extras[extra], extras)
        else:
            yield _name(requirement)


def test_whatever_the_commands_of_readme_and_contributing_install_by_name_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()}
    wanted = {*_installed(project["dependencies"], extras)}
    for page in ("README.md", "CONTRIBUTING.md"):
        for named in re.findall(r"pip install -c constraints\.txt .*?\.\[([a-z,-]+)\]", (ROOT / page).read_text()):
            wanted |= {name for extra in named.split(",") for name in _installed(extras[extra], extras)}
    # What these need in turn may stay free.
    assert {"rouge-score", "scipy", "zensical", "torch"} <= wanted
    assert wanted - pinned == set()
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+]+", line) for line in (ROOT / "constraints.txt").read_text().split()
    )


COUNTS = {
    "artifacts/checkpoints/read.py": "of all tensors of a checkpoint",
    "artifacts/models/gguf_header.py": "of all tensors of a file",
    "recipes/common/settings.py": "one problem is a line of its own",
    "recipes/concept/make.py": "the split stands there, and not a count",
}
"""Files with a count before a plural that is never one, and why."""


def test_counts_that_may_be_one_are_put_into_words_by_the_one_helper():
    found = {}
    for folder in ("editing", "eval", "artifacts", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.JoinedStr):
                    continue
                for before, value, after in zip([None, *node.values], node.values, node.values[1:], strict=False):
                    text = after.value if isinstance(after, ast.Constant) else ""
                    counts = isinstance(value, ast.FormattedValue) and re.match(
                        r" (?:[a-z-]+ )*?[a-z]+s (?:were|are|have|do)\b", text
                    )
                    # "3 of 40 rows are": the verb goes with the many.
                    if counts and not (isinstance(before, ast.Constant) and before.value.endswith(" of ")):
                        found[str(path.relative_to(ROOT))] = text
    assert found.keys() == COUNTS.keys(), found
    assert counted(1, "row was", "rows were") == "1 row was" and counted(0, "row was", "rows were") == "0 rows were"
