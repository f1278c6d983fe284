"""Folders with more than one set of weights, as merges into a used folder leave them (mlx-vlm PR #1464)."""

import json
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import INDEX, SINGLE, open_checkpoint
from excise.editing.errors import CheckpointError
from helpers import excise, make_pico, random_edit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def sharded(save_pico):
    return save_pico("llama", max_shard_size="20KB").folder


@pytest.fixture
def stale(sharded):
    """Another model of the same kind, in the same folder."""
    tensors = {name: tensor + 0.5 for name, tensor in make_pico("llama").state_dict().items()}
    save_file(tensors, sharded / SINGLE, {"format": "pt"})
    return sharded


def test_a_stale_single_file_beside_an_index_is_refused_and_both_are_named(stale):
    # What the refusal keeps from happening: transformers would measure the file, and the shards would be published.
    read = AutoModelForCausalLM.from_pretrained(stale).state_dict()["model.norm.weight"]
    assert not torch.equal(read, make_pico("llama").state_dict()["model.norm.weight"])
    done = excise("eval", stale, "--concept", "builtin:declining")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{SINGLE} is there" in done.stderr and f"{INDEX} names model-00001" in done.stderr


def test_a_left_over_shard_is_refused(sharded):
    shutil.copyfile(next(sharded.glob("model-*")), sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00009-of-00009\.safetensors is there"):
        open_checkpoint(sharded)


def test_shards_whose_index_is_lost_are_refused_beside_a_single_file(stale):
    (stale / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001.*whole model"):
        open_checkpoint(stale)


def test_a_shard_that_is_called_as_the_whole_model_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first = min(index["weight_map"].values())
    (sharded / first).rename(sharded / SINGLE)
    index["weight_map"] = {name: SINGLE if at == first else at for name, at in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="as one of"):
        open_checkpoint(sharded)


def test_an_index_of_one_file_is_taken(save_pico):
    checkpoint = save_pico("llama")
    (checkpoint.folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(checkpoint.tensors, SINGLE)}))
    assert len(open_checkpoint(checkpoint.folder).shards) == 1


def test_weights_in_other_forms_beside_the_shards_are_neither_read_nor_copied(sharded, tmp_path):
    others = ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "onnx/model.onnx")
    for name in others:
        (sharded / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(next(sharded.glob("model-*")), sharded / name)
    (sharded / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    checkpoint = open_checkpoint(sharded)
    (tmp_path / "out").mkdir()
    export_edit(random_edit(checkpoint.config), checkpoint, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert not written & {*others, "pytorch_model.bin.index.json"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
