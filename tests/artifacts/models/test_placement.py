"""Models go whole to a GPU that holds them, over several that do not, and to main memory as the last resort."""

import logging
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models import placement as placing
from excise.artifacts.models.dequantized import check_loadable
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_device, choose_dtype, load_weights
from excise.artifacts.models.memory import weight_bytes
from excise.artifacts.models.placement import check_trainable, placement, placement_of
from excise.editing.errors import ExciseError, RequestError
from helpers import SMALL_TESTBED
from transformers import AutoModelForCausalLM

CUDA = torch.device("cuda")
FREE = (100, 60)


@pytest.mark.parametrize(
    ("weights", "free", "room", "left_over"),
    [
        (80, FREE, {}, 0),
        (81, FREE, {0: 80, 1: 48}, 0),
        (128, FREE, {0: 80, 1: 48}, 0),
        (129, FREE, {0: 80, 1: 48, "cpu": 240}, 1),
        # Alone, a GPU is used to its end.
        (100, (100,), {}, 0),
        (101, (100,), {0: 80, "cpu": 240}, 21),
    ],
)
def test_a_gpu_comes_first_then_all_gpus_then_main_memory(weights, free, room, left_over):
    found = placement(weights, free, 300)
    assert found.room == room and found.left_over == left_over and found.fits
    assert found.offloads == (left_over > 0) and bool(found.sentence("m")) == bool(room)
    assert ("main memory" in found.sentence("m")) == found.offloads
    assert not placement(1000, free, 300).fits


class Gpus:
    """GPUs as PyTorch tells of them, with so many free bytes each."""

    def __init__(self, monkeypatch, *free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0],) * 2)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)


def test_auto_takes_all_gpus_and_a_numbered_one_stays_alone(monkeypatch):
    checkpoint = open_checkpoint(Path(SMALL_TESTBED))
    size = weight_bytes(checkpoint, torch.float32)
    Gpus(monkeypatch, size // 2, size)
    for name in ("auto", "cuda"):
        assert set(placement_of(checkpoint, choose_device(name), torch.float32).room) == {0, 1}
        check_loadable(checkpoint, choose_device(name), torch.float32)
        check_trainable(checkpoint, choose_device(name), torch.float32)
    assert not placement_of(checkpoint, choose_device("cuda:1"), torch.float32).room
    with pytest.raises(ExciseError, match="cuda:0 has"):
        check_loadable(checkpoint, torch.device("cuda:0"), torch.float32)


def test_what_no_gpu_holds_is_measured_from_main_memory_and_never_trained(monkeypatch):
    checkpoint = open_checkpoint(Path(SMALL_TESTBED))
    size = weight_bytes(checkpoint, torch.float32)
    Gpus(monkeypatch, size // 2, size // 4)
    check_loadable(checkpoint, CUDA, torch.float32)
    with pytest.raises(RequestError, match="training needs all weights on GPUs"):
        check_trainable(checkpoint, CUDA, torch.float32)
    monkeypatch.setattr(placing, "available_memory", lambda: size // 10)
    with pytest.raises(ExciseError, match="GPUs and main memory have room for"):
        check_loadable(checkpoint, CUDA, torch.float32)


def test_a_gpu_without_bfloat16_computes_in_float16_and_a_mac_in_float32(monkeypatch):
    Gpus(monkeypatch, 1)
    assert choose_dtype("auto", CUDA) == torch.float16
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    assert choose_dtype("float16", torch.device("mps")) == torch.float16
    with pytest.raises(RequestError, match="use --dtype float16 or float32 on mps"):
        choose_dtype("bfloat16", torch.device("mps"))
    with pytest.raises(RequestError, match="Apple silicon"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    checkpoint = open_checkpoint(Path(SMALL_TESTBED))
    with pytest.raises(RequestError, match="float16 needs a scaled loss"):
        check_trainable(checkpoint, torch.device("mps"), torch.float16)


def test_a_model_that_overflows_in_float16_is_one_line(tmp_path):
    source = find_model(SMALL_TESTBED)
    assert load_weights(source, torch.device("cpu"), torch.float16).dtype == torch.float16
    model = AutoModelForCausalLM.from_pretrained(SMALL_TESTBED)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    model.save_pretrained(tmp_path / "m")
    for file in Path(SMALL_TESTBED).glob("tokenizer*"):
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    large = find_model(str(tmp_path / "m"))
    load_weights(large, torch.device("cpu"), torch.float32)
    with pytest.raises(ExciseError, match="overflows in float16"):
        load_weights(large, torch.device("cpu"), torch.float16)


def test_a_model_over_several_places_is_planned_by_the_library_and_said_in_a_line(tmp_path, monkeypatch, caplog):
    """Two small places: the processor stands for the first GPU, and the disk for what has no room there."""
    source = find_model(SMALL_TESTBED)
    whole = load_weights(source, torch.device("cpu"), torch.float32)
    size = weight_bytes(open_checkpoint(source.folder), torch.float32)
    options = {"device_map": "auto", "max_memory": {"cpu": size * 2 // 3, "disk": size}, "offload_folder": tmp_path}
    spread = AutoModelForCausalLM.from_pretrained(SMALL_TESTBED, dtype=torch.float32, **options)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(spread(input_ids=ids).logits, whole(input_ids=ids).logits)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("excise").warning(placement(150, FREE, 300).sentence("a/model"))
    assert "15% of its weights stay in main memory" in caplog.text
