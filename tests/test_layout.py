import ast
import subprocess
import sys
import tomllib
from pathlib import Path

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


def test_editing_opens_no_file_and_prints_nothing():
    for path in (ROOT / "editing").rglob("*.py"):
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"open", "print"}, path


def test_every_folder_with_code_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"excise"} | {
        ".".join(["excise", *path.parent.relative_to(ROOT).parts])
        for folder in ORDER[:-1]
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


def test_help_does_not_import_torch():
    code = "import sys; import excise.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_but_cli_stands_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py", "cli.py"]
