"""Every file that a user can touch is read through ``artifacts/files``."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOOR = "artifacts/files"
READERS = {
    ("json", "load"), ("json", "loads"), ("yaml", "load"), ("yaml", "safe_load"), ("yaml", "compose"),
    ("yaml", "full_load"), ("np", "load"), ("numpy", "load"), ("torch", "load"), ("pickle", "load"),
}  # fmt: skip
NAMES = {"safe_open", "load_file", "GGUFReader"}
ALLOWED = {
    "eval/measurements/lm_eval.py": "a task of the lm-evaluation-harness has tags of its own, and its code will run",
    "artifacts/checkpoints/sae_files.py": "an archive of arrays, or tensors of other libraries, each fault told there",
    "recipes/common/adapter_run.py": "predictions that the run sealed, read only after their checksum was compared",
}


def _readers(source):
    """Calls in a module that read a file's text or tensors by other means."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for call in calls:
        function = call.func
        if isinstance(function, ast.Name) and function.id in NAMES:
            yield function.id
        if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
            continue
        if (function.value.id, function.attr) in READERS or function.attr in NAMES:
            yield f"{function.value.id}.{function.attr}"


def test_no_module_but_the_door_reads_json_yaml_or_tensors():
    found = {}
    for folder in ("editing", "eval", "artifacts", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(DOOR) and (calls := list(_readers(path.read_text()))):
                found[name] = calls
    assert found.keys() == ALLOWED.keys(), found
    assert list(_readers((ROOT / "cli.py").read_text())) == []


def test_a_module_that_reads_by_itself_would_be_seen():
    assert list(_readers("import json\njson.loads(path.read_text())")) == ["json.loads"]
    assert list(_readers("with safe_open(path, 'pt') as file: pass")) == ["safe_open"]
    assert list(_readers("json.dumps({})\nread_json(path)")) == []
