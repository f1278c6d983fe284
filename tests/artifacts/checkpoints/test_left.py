"""What an edit of the language model leaves as it is, in words."""

import json

from excise.artifacts.checkpoints.left import in_words, parts_left
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.editing.wiring.small_copy import small_copy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig


def test_towers_and_tensors_that_are_not_loaded_are_named(tmp_path):
    config = json.loads(AutoConfig.for_model("qwen3_5").to_json_string(use_diff=False))
    small_copy(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    # As released checkpoints have it: a layer that predicts further tokens.
    save_file({**tensors, "mtp.norm.weight": tensors[norm].clone()}, file, metadata={"format": "pt"})
    left = parts_left(open_checkpoint(tmp_path))
    assert left == {"towers": ["images"], "not_loaded": 1, "first_not_loaded": ["mtp.norm.weight"]}
    tower, predicted = in_words(left)
    assert "language model alone" in tower and "images" in tower
    assert "1 stored tensors that transformers does not load (mtp.norm.weight)" in predicted


def test_a_plain_language_model_leaves_nothing(save_pico):
    assert parts_left(save_pico("llama")) == {}
    assert in_words({}) == []
