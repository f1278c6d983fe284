import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["editing", "eval", "artifacts", "recipes", "cli"]


def _imports(path):
    """Folders of the package that a module imports, by relative imports only."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                yield (*base, *(node.module or "").split("."))[0] if base or node.module else node.names[0].name
            else:
                assert not (node.module or "").startswith("excise"), f"{path} imports excise by name"


def test_imports_run_one_way():
    checked = 0
    for folder in ORDER[:-1]:
        for path in (ROOT / folder).rglob("*.py"):
            for target in _imports(path):
                if target in ORDER:
                    assert ORDER.index(target) <= ORDER.index(folder), f"{path} imports {target}"
                    checked += 1
    assert checked > 50


def _rooms(folder):
    """Which rooms import which inside one folder; a room is a sub-folder, or a file that stands beside them."""
    edges = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = (folder, *parts)[: len(parts) + 1 - node.level]
            for target in ((*base, *(node.module or "").split("."), alias.name) for alias in node.names):
                target = tuple(part for part in target if part)
                # A name of the folder's own ``__init__`` is no room.
                known = len(target) > 1 and any((ROOT / folder / f"{target[1]}{end}").exists() for end in ("", ".py"))
                if known and target[0] == folder and target[1] != parts[0]:
                    edges.setdefault(parts[0], set()).add(target[1])
    return edges


def _storeys(edges):
    """Rooms by storey, the longest way down below each; raises where the way leads in a circle."""
    heights = {}

    def height(room, way=()):
        assert room not in way, f"imports run in a circle: {' -> '.join((*way, room))}"
        if room not in heights:
            heights[room] = 1 + max((height(below, (*way, room)) for below in edges.get(room, ())), default=0)
        return heights[room]

    for room in list(edges):
        height(room)
    return heights


@pytest.mark.parametrize("folder", ORDER[:-1])
def test_rooms_inside_a_folder_import_one_way_and_stand_in_few_storeys(folder):
    heights = _storeys(_rooms(folder))
    assert len(heights) >= 4 and max(heights.values()) <= 5, heights


def test_a_circle_of_rooms_would_be_seen():
    with pytest.raises(AssertionError, match="in a circle: elm -> caft -> elm"):
        _storeys({"elm": {"caft"}, "caft": {"elm"}})


def test_editing_opens_no_file_and_prints_nothing():
    for path in (ROOT / "editing").rglob("*.py"):
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"open", "print"}, path


def test_what_is_written_about_a_run_names_no_method():
    """A method says itself what a reader must know; ``reporting`` renders what it says."""
    names = re.compile(
        r"\b(elm|caft|prune|pruning|lorra|rmu|npo|simnpo|grad_diff|orthogonali[sz]e)\b|"
        r"""\[?["'.](direction|leaks|target_check)\b|get\("(direction|training|target_check)""",
        re.IGNORECASE,
    )
    paths = [
        path for path in (ROOT / "artifacts").rglob("*") if path.suffix in (".py", ".j2") and path.name != "upgrade.py"
    ]
    # The file format's table of kinds of edits stands in edits.py.
    named = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in paths
        for line in path.read_text().splitlines()
        if names.search(line) and not re.match(r' +"(orthogonalize|prune)": Method\(', line)
    ]
    assert named == [] and len(paths) > 40
    assert names.search('caft=results.get("caft")') and names.search("{% if results.direction %}")


def test_every_folder_with_code_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"excise"} | {
        ".".join(["excise", *path.parent.relative_to(ROOT).parts])
        for folder in ORDER[:-1]
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


def test_help_does_not_import_torch():
    code = (
        "import sys; import excise.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers',"
        " 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_but_cli_stands_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py", "cli.py"]
