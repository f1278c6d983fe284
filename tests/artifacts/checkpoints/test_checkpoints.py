import json
import shutil
import struct

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_device, choose_dtype, load_model
from excise.editing.errors import CheckpointError, RequestError
from helpers import excise
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(save_pico):
    return save_pico("llama", max_shard_size="20KB").folder


def _first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_a_whole_checkpoint_opens(sharded):
    assert len(open_checkpoint(sharded).shards) > 2


def test_a_missing_shard_is_named(sharded):
    _first_shard(sharded).unlink()
    with pytest.raises(CheckpointError, match="shards are missing, the first is model-00001"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(sharded, keep):
    path = _first_shard(sharded)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00001.* truncated"):
        open_checkpoint(sharded)


def test_bytes_after_the_last_tensor_are_an_error(sharded):
    path = _first_shard(sharded)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_is_refused(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        open_checkpoint(sharded)


def test_an_index_that_disagrees_with_the_shards_is_an_error(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.extra"] = _first_shard(sharded).name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"disagree about model\.layers\.9\.extra"):
        open_checkpoint(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded, tmp_path):
    path = _first_shard(sharded)
    shutil.move(path, tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link out of the model's folder"):
        open_checkpoint(sharded)


def test_links_into_the_hub_cache_are_followed(sharded, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sharded.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert len(open_checkpoint(snapshot).shards) > 2


@pytest.mark.parametrize(
    "header",
    [b"{ ", b"[]", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b'{"a":1}', b'{"a":{},"a":{}}'],
)
def test_a_damaged_header_is_an_error(sharded, header):
    path = _first_shard(sharded)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="damaged header"):
        open_checkpoint(sharded)


def test_a_huge_header_length_is_not_allocated(sharded):
    path = _first_shard(sharded)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(sharded)


def test_pickles_are_refused_with_what_to_do(save_pico, tmp_path):
    folder = save_pico("llama").folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="pickle"):
        find_model(str(tmp_path / "model.bin"))


def test_a_missing_tensor_is_an_error_and_not_random_weights(tmp_path):
    source = find_model("builtin:testbed")
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys, the first is model\.layers\.3\.mlp\.up_proj"):
        load_model(find_model(str(folder)), torch.device("cpu"), torch.float32)


def test_an_unexpected_tensor_is_an_error(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(find_model("builtin:testbed").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.gate_proj.bias"] = torch.zeros(512)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected keys"):
        load_model(find_model(str(folder)), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("builtin:testbd", "did you mean 'testbed'"),
        ("./nowhere", "no model folder"),
        ("nobody/nothing", "the Hub cannot be reached"),
        ("missing.gguf", "no file"),
    ],
)
def test_a_reference_to_nothing_says_what_to_give(ref, message):
    with pytest.raises(RequestError, match=message):
        find_model(ref)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        find_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(RequestError, match=r"unknown|does not exist"):
        choose_device(device)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RequestError, match="give auto, float32, bfloat16 or float16"):
        choose_dtype("float8", torch.device("cpu"))


def test_apply_refuses_a_bad_base_with_one_line_and_leaves_nothing(sharded, tmp_path):
    _first_shard(sharded).unlink()
    (tmp_path / "edit").mkdir()
    done = excise("apply", tmp_path / "edit", "--base", sharded, "--out", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "edit.json" in done.stderr
    assert not (tmp_path / "new").exists()
