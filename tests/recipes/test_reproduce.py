"""A published checkpoint can be made again from its own record, and the record is checked first."""

import json
import shutil

import pytest
from excise.artifacts.checkpoints.manifest import amend_folder
from excise.artifacts.models.source import BUILTIN
from helpers import excise, excise_afresh, with_settings
from huggingface_hub import ModelCard
from loopback_hub import client, folder_files, hub

SMALL = with_settings("steps=2", "batch_size=2", "controls=false", "questions=12", "kl_prompts=4", "max_new_tokens=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "run"
    done = excise("run", "caft", "--out", out, "--seed", 3, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_the_same_weights_come_out_and_others_do_not(made, tmp_path):
    done = excise_afresh("reproduce", made, "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and found["holds"] and not found["differences"] and found["compared"] > 3
    # The same record with another seed gives other weights, and that is told.
    copy = tmp_path / "copy"
    shutil.copytree(made / "checkpoint", copy)
    content = json.loads((copy / "excise" / "eval.json").read_text())
    content["run"]["settings"]["seed"] = 4
    amend_folder(copy, {"excise/eval.json": json.dumps(content)})
    other = excise("reproduce", copy, "--out", tmp_path / "other", "--json")
    assert other.returncode == 1 and json.loads(other.stdout)["changed_files"] == ["model.safetensors"]


def test_a_measurement_that_is_not_made_again_is_told(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "checkpoint", copy)
    content = json.loads((copy / "excise" / "eval.json").read_text())
    one = next(item for item in content["measurements"] if item["subject"] == "edited")
    content["measurements"].append({**one, "name": "no longer measured"})
    amend_folder(copy, {"excise/eval.json": json.dumps(content)})
    done = excise("reproduce", copy, "--out", tmp_path / "again", "--json")
    found = json.loads(done.stdout)
    assert found["outside"] == [f"no longer measured ({one['split']}) was not measured again"] and found["identical"]


@pytest.fixture(scope="module")
def from_local(tmp_path_factory):
    """A run whose rows are in a file of one's own."""
    place = tmp_path_factory.mktemp("local")
    data = place / "secret-place" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text((BUILTIN / "concepts" / "shortcut" / "train.jsonl").read_text())
    done = excise("run", "caft", "--out", place / "run", "--set", f"data={data}", *SMALL)
    assert done.returncode == 0, done.stderr
    return place / "run" / "checkpoint", data


def test_nothing_local_stands_in_what_is_published(from_local):
    folder, _ = from_local
    texts = [p for p in folder.rglob("*") if p.suffix in (".md", ".json", ".safetensors")]
    assert len(texts) > 6 and not any(b"secret-place" in path.read_bytes() for path in texts)
    assert "rows.jsonl" in (folder / "README.md").read_text()


def test_a_run_on_the_hub_made_with_a_local_file_is_made_again_once_told_where_the_file_is(from_local, tmp_path):
    folder, data = from_local
    again = tmp_path / "new" / "again"
    with hub() as known:
        environment = client(known, tmp_path / "hf")
        known.add("tester/model", folder_files(folder))
        words = ["reproduce", "tester/model", "--out", again, "--json"]
        lost = excise(*words, **environment)
        assert lost.returncode == 2 and "rows.jsonl" in lost.stderr
        wrong = excise(*words, "--file", "data=other.jsonl", **environment)
        assert wrong.returncode == 2 and "data was 'rows.jsonl'" in wrong.stderr
        assert not list(again.parent.iterdir())
        done = excise(*words, "--file", f"data={data}", **environment)
    assert done.returncode == 0 and json.loads(done.stdout)["identical"], done.stderr
    assert [path.name for path in again.parent.iterdir()] == ["again"]


def test_another_base_or_pack_is_refused_before_anything_runs(made, tmp_path):
    done = excise("reproduce", made, "--out", tmp_path / "again", "--model", "builtin:testbed-reference")
    assert done.returncode == 2 and "is not the recorded base" in done.stderr
    done = excise("reproduce", made, "--out", tmp_path / "again", "--concept", "builtin:potions")
    assert done.returncode == 2 and "is not the recorded concept pack" in done.stderr
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_without_a_record_says_what_to_do(made, tmp_path):
    done = excise("reproduce", BUILTIN / "testbed", "--out", tmp_path / "again")
    assert done.returncode == 2 and "has no SHA256SUMS" in done.stderr


def test_the_cards_metadata_is_the_hubs_and_says_what_was_measured(made):
    folder = made / "checkpoint"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert {"excise", "caft"} <= set(card.data.tags)
    measured = json.loads((folder / "excise" / "eval.json").read_text())["measurements"]
    values = {(m["name"], m["split"]): m["value"] for m in measured if m["subject"] == "edited"}
    results = card.data.eval_results
    assert len(results) > 3
    for result in results:
        assert result.metric_value == pytest.approx(values[result.metric_type, result.dataset_split], abs=1e-6)
