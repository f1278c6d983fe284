"""Folders that are no longer what was written, and runs of another form: told, and never used."""

import json
import os
import shutil

import pytest
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.event_log import read_events
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_tokenizer
from excise.artifacts.models.source import ModelSource
from excise.artifacts.runs import find_runs
from excise.artifacts.upgrade import read_json
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.errors import CheckpointError, RequestError, VerifyError
from excise.recipes.compare import table_of
from excise.recipes.ui.pages import _line
from helpers import SMALL_TESTBED, excise, publish

EDIT = PrunedUnits({0: (1, 2)}, {}, "down", "llama", 192, 8, 1)
MEASURED = {"name": "multiple_choice", "split": "forget_V", "subject": "edited", "value": 0.5, "unit": "accuracy",
            "better": "lower", "n": 8, "skipped": 0, "ci95": [0.2, 0.8]}  # fmt: skip
RESULTS = {"schema_version": 2, "base": {"name": "b"}, "concept": {"ref": "c", "sha256": {}},
           "run": {"recipe": "prune", "settings": {}}, "measurements": [MEASURED]}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run with its checkpoint, its edit, card, results and checksums."""
    run = tmp_path_factory.mktemp("published") / "run"
    run.mkdir()
    save_edit(EDIT, run / "edit")
    texts = {"README.md": "# A card\n", "excise/eval.json": json.dumps(RESULTS)}
    texts |= {"excise/edit.json": (run / "edit" / "edit.json").read_text()}
    folder = publish(run / "checkpoint", EDIT, texts)
    assert folder == run / "checkpoint"
    shutil.rmtree(run / "edit")
    return run


@pytest.fixture
def run(published, tmp_path):
    shutil.copytree(published, tmp_path / "run")
    return tmp_path / "run"


def test_a_comparison_uses_results_as_they_were_published_alone(run):
    lines, _ = table_of([run])
    assert [line.name for line in lines] == ["b", "run"]
    path = run / "checkpoint" / "excise" / "eval.json"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(VerifyError, match=r"checkpoint is not as it was published: excise/eval.json was changed"):
        table_of([run])


def test_a_card_that_was_written_over_is_not_shown(run):
    assert "A card" in excise("card", run).stdout
    (run / "checkpoint" / "README.md").write_text("# Another card\n")
    done = excise("card", run)
    assert done.returncode == 1 and "README.md was changed" in done.stderr and "Another" not in done.stdout


def test_an_edit_that_was_changed_in_its_checkpoint_is_not_applied(run):
    path = run / "checkpoint" / "excise" / "edit.json"
    path.write_text(path.read_text().replace("down", "all"))
    with pytest.raises(VerifyError, match=r"excise/edit.json was changed"):
        load_edit(run)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda c: [], "it holds a list, not a JSON object"),
        (lambda c: {**c, "measurements": {}}, "measurements: input should be a valid list"),
        (lambda c: {**c, "measurements": [{**MEASURED, "value": "high"}]}, "measurements.0.value: .*got 'high'"),
        (lambda c: {**c, "measurements": [{**MEASURED, "ci95": [0.1]}]}, "measurements.0.ci95: .*at least 2 items"),
        (lambda c: {**c, "measurements": [{**MEASURED, "extra": 1}]}, "measurements.0.extra: extra inputs"),
        (lambda c: {**c, "concept": None}, "concept: "),
        (lambda c: {key: value for key, value in c.items() if key != "run"}, "run: field required"),
        (lambda c: {**c, "run": {"recipe": 3}}, "run.recipe: "),
    ],
)
def test_results_of_another_form_stop_a_comparison_in_one_line_and_leave_the_list_whole(tmp_path, change, told):
    for name, content in (("good", RESULTS), ("bad", change(RESULTS))):
        (tmp_path / name / "excise").mkdir(parents=True)
        (tmp_path / name / "excise" / "eval.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=told) as caught:
        table_of([tmp_path / "good", tmp_path / "bad"])
    assert "\n" not in str(caught.value)
    lines = {line["name"]: line for line in map(_line, find_runs(tmp_path))}
    assert lines["good"]["main"].startswith("multiple choice") and lines["bad"]["name"] == "bad"
    states = {run.name: (run.state, run.main_change != "") for run in find_runs(tmp_path)}
    assert states["good"] == ("finished", True) and "bad" in states


@pytest.mark.parametrize("text", ["", "{", '{"files": []}', '{"files": {}, "base": 3}', "[" * 3000])
def test_a_manifest_of_another_form_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RequestError, match=r"manifest\.json cannot be read") as caught:
        read_json(tmp_path / "manifest.json")
    assert "\n" not in str(caught.value)


def test_events_that_a_kill_cut_are_left_out_and_the_next_line_stands_alone(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.write("train", 1, {"seconds": 2.0})
    path.write_bytes(path.read_bytes() + b'{"time": 1.0, "stage": "tra')
    events.write("train", 2, {"seconds": 3.0})
    for line in ("[]", '{"stage": 3, "step": 1, "metrics": {}}', "\x00"):
        path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    events.write("train", 3, {})
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RequestError, match=r"events\.jsonl cannot be read"):
        read_events(path)


@pytest.fixture
def model(tmp_path):
    shutil.copytree(SMALL_TESTBED, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["cut", "list", "twice", "pipe"])
def test_a_damaged_file_of_a_model_is_one_line(model, name, damage):
    assert open_checkpoint(model).config
    path = model / name
    text = path.read_text() if path.exists() else '{"a": 1}'
    path.unlink(missing_ok=True)
    if damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_text({"cut": text[: len(text) // 2], "list": "[]", "twice": '{"a": 1, "a": 2}'}[damage])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read .*fetch it again") as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


def test_a_cut_tokenizer_is_one_line(model):
    text = (model / "tokenizer.json").read_text()
    for damaged in (text[: len(text) // 2], "[]", "{}", ""):
        (model / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"has no usable tokenizer|cannot render") as caught:
            load_tokenizer(ModelSource("local", "model", model))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value", [("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("vocab_size", -1), ("hidden_size", "wide")]
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_a_model_is_built(model, key, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=f"states {key} = {value!r}"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"dtype": "F33"}, "is of the unknown type 'F33'"),
        ({"shape": [-1, 1]}, "shape.0: input should be greater than or equal to 0"),
        ({"shape": "x"}, "shape: input should be a valid list"),
        ({"data_offsets": [0]}, "data_offsets: .*at least 2 items"),
        ({"data_offsets": [0, True]}, "data_offsets.1: input should be a valid integer"),
        ({"data_offsets": [0.0, 4]}, "data_offsets.0: input should be a valid integer"),
    ],
)
def test_a_header_with_odd_entries_is_refused(model, entry, told):
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)
