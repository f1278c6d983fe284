"""GGUF files that are not whole: none becomes a model, and none is left in the cache."""

import json
import re

import pytest
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.cache import cache_folder
from excise.artifacts.models.find import find_model
from excise.editing.errors import CheckpointError, UnsupportedArchitecture
from small_gguf import SHAPES, write_gguf
from transformers import AutoConfig


def _converted():
    return {path.name for path in cache_folder().glob("*gguf*")}


def test_a_whole_file_becomes_a_model_with_every_tensor(tmp_path):
    source = find_model(str(write_gguf(tmp_path / "whole.gguf")))
    assert len(open_checkpoint(source.folder).tensors) == len(SHAPES)


def test_a_link_of_another_name_is_followed(tmp_path):
    """The Hub's cache holds files under their hash, and links to them under their name."""
    write_gguf(tmp_path / "whole.gguf").rename(tmp_path / "5f3c")
    link = tmp_path / "model.gguf"
    link.symlink_to(tmp_path / "5f3c")
    assert find_model(str(link)).name == "model.gguf"


def test_a_conversion_says_the_same_to_transformers_4(tmp_path):
    """unsloth #8444: a class of transformers 5 alone. Where transformers 4 finds no rope_theta it takes 10000."""
    folder = find_model(str(write_gguf(tmp_path / "whole.gguf", rope_base=500000.0))).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    "damage, told",
    [
        ({"without": ["blk.0.ffn_up.weight"]}, "1 missing keys, the first is model.layers.0.mlp.up_proj.weight;"),
        ({"without": ["blk.0.attn_q.weight", "blk.0.ffn_up.weight"]}, "2 missing keys, .*mlp.up_proj.*self_attn.q"),
        ({"without": list(SHAPES)}, "its 0 tensors do not have"),
        ({"not_finite": "blk.0.ffn_up.weight"}, "not_whole.gguf.*up_proj.weight holds NaN or infinite"),
        # A model of that many layers would be built before any of them was missed.
        ({"layers": 10**9}, "states llama.block_count = 1000000000"),
    ],
)
def test_a_file_that_lacks_what_it_needs_is_refused_and_leaves_nothing_behind(tmp_path, damage, told):
    before = _converted()
    with pytest.raises(CheckpointError, match=told) as caught:
        find_model(str(write_gguf(tmp_path / "not_whole.gguf", **damage)))
    assert "\n" not in str(caught.value) and _converted() == before


def test_a_type_that_cannot_be_edited_is_refused_before_its_weights_are_converted(tmp_path):
    file = write_gguf(tmp_path / "t5.gguf", kind="t5")
    before = _converted()
    with pytest.raises(UnsupportedArchitecture, match="t5 has an encoder and a decoder") as caught:
        find_model(str(file), to_edit=True)
    assert "\n" not in str(caught.value) and _converted() == before
    # A file of the same tensors of a type that can be edited is converted.
    assert find_model(str(write_gguf(tmp_path / "llama.gguf")), to_edit=True).folder.is_dir()


def test_lengths_and_counts_beyond_the_file_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    place = whole.index(b"llama.block_count") - 8
    for name, damaged in {
        "text": whole[:place] + (1 << 60).to_bytes(8, "little") + whole[place + 8 :],
        "entries": whole[:16] + (1 << 60).to_bytes(8, "little") + whole[24:],
        "cut": whole[: len(whole) // 2],
        "version": whole[:4] + (9).to_bytes(4, "little") + whole[8:],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(path.name)) as caught:
            find_model(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("added", [4, 32, -4, -32])
def test_bytes_added_or_missing_among_the_tensors_are_refused_because_all_after_them_are_others(tmp_path, added):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    place = len(whole) - 4096
    path = tmp_path / "shifted.gguf"
    path.write_bytes(whole[:place] + bytes(max(0, added)) + whole[place + max(0, -added) :])
    with pytest.raises(CheckpointError, match=f"its tensors end at byte {len(whole)}, but it has {len(whole) + added}"):
        find_model(str(path))


def test_a_tensor_that_begins_elsewhere_than_the_one_before_it_ends_is_refused(tmp_path):
    whole = bytearray(write_gguf(tmp_path / "whole.gguf").read_bytes())
    # The offset stands behind the name, the number of dimensions, these and the type.
    place = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    whole[place : place + 8] = (int.from_bytes(whole[place : place + 8], "little") + 32).to_bytes(8, "little")
    path = tmp_path / "elsewhere.gguf"
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="does not begin where the one before it ends"):
        find_model(str(path))
