"""The notebook of the documentation: it runs, it is what its source says, and its results hold."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook's reader is missing: pip install '.[test]'")
DOCS = Path(__file__).parents[2] / "docs"
SMALL = """\
search = {"train_pairs": 16, "validation_pairs": 4, "positions": 1}
sizes = {"questions": 8, "kl_prompts": 4, "max_new_tokens": 10}
attacks = ["int4", "bf16"]"""


def _module():
    spec = importlib.util.spec_from_file_location("make_notebook", DOCS / "make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make():
    return _module()


@pytest.fixture(scope="module")
def committed(make):
    return nbformat.read(make.NOTEBOOK, as_version=4)


def _check(notebook):
    """No cell fails or writes to the error stream."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def _result(notebook, source):
    """What the one cell shows whose last line is this."""
    (cell,) = (cell for cell in notebook.cells if cell.source.splitlines()[-1:] == [source])
    return cell.outputs[-1].data


def _declines(notebook):
    return ast.literal_eval(_result(notebook, "before.value, after.value, after.n")["text/plain"])


def test_the_notebook_runs_and_the_model_no_longer_declines(make, committed, tmp_path):
    cells = [cell.copy() for cell in committed.cells]
    (parameters,) = (cell for cell in cells if make.PARAMETERS in cell.metadata.get("tags", ()))
    parameters.source = SMALL
    executed = make.execute(cells, tmp_path)
    _check(executed)
    before, after, n = _declines(executed)
    assert before > 0.9 and after < 0.1 and n == 200
    # Without an attack that fine-tunes there is no control, and without a control no verdict.
    assert ast.literal_eval(_result(executed, "audit.verdict")["text/plain"]) == "inconclusive"
    assert "add rtt or relearn" in _result(executed, "audit")["text/html"]
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_shows_that_facts_stay_where_a_habit_goes(committed):
    _check(committed)
    assert _declines(committed) == (1.0, 0.0, 200)
    assert ast.literal_eval(_result(committed, "audit.verdict")["text/plain"]) == "recovers"
    assert "It was never erased" in _result(committed, "audit")["text/html"]


def test_the_notebook_is_what_its_source_says(make, committed):
    written = [(c.cell_type, c.source, c.id, c.metadata) for c in make.cells()]
    assert [(c.cell_type, c.source, c.id, c.metadata) for c in committed.cells] == written, "run docs/make_notebook.py"
    assert committed.metadata == make.METADATA
    assert make.PAGE.read_text(encoding="utf-8") == make.page(committed), "run docs/make_notebook.py"


def test_the_notebook_is_short_and_names_no_place_on_a_machine(make, committed):
    text = make.NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 40_000
    outputs = json.dumps([cell.get("outputs", []) for cell in committed.cells])
    assert not [place for place in ("/tmp", "/home", "/root", "/work", str(Path.home())) if place in outputs]
    code = [cell.source.splitlines() for cell in committed.cells if cell.cell_type == "code"]
    assert all(len(lines) <= 6 for lines in code)
