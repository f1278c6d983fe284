"""Checkpoints as people have them: old buffers, heads of classifiers, pointers in place of files, NaN, too large."""

import json
import os

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.editing.errors import EditError
from helpers import SMALL_TESTBED, excise, random_edit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BUFFERS = {
    "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(4),
    },
}


@pytest.fixture
def changed(save_pico):
    """A small model whose tensors were changed on disk."""

    def make(kind, change):
        checkpoint = save_pico(kind)
        file = checkpoint.shards[0].path
        save_file(change(load_file(file)), file, {"format": "pt"})
        return open_checkpoint(checkpoint.folder)

    return make


@pytest.mark.parametrize("kind", sorted(BUFFERS))
def test_buffers_of_old_versions_are_kept_and_the_model_loads(kind, changed, tmp_path):
    """As on the Hub: gpt2 without its prefix and with attn.bias, Llama's inv_freq, NeoX's masked_bias."""
    prefix = "transformer." if kind == "gpt2" else "-"
    checkpoint = changed(kind, lambda all: {n.removeprefix(prefix): t for n, t in all.items()} | BUFFERS[kind])
    (tmp_path / "out").mkdir()
    export_edit(random_edit(checkpoint.config), checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, buffer in BUFFERS[kind].items():
        assert torch.equal(written[name], buffer)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_head_of_a_classifier_is_refused_by_name(changed, tmp_path):
    """Reward models: score.weight in place of an unembedding."""
    checkpoint = changed("llama", lambda all: all | {"score.weight": torch.ones(1, 32)})
    save_edit(random_edit(checkpoint.config), tmp_path / "edit")
    done = excise("apply", tmp_path / "edit", "--base", checkpoint.folder, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "score.weight" in done.stderr


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_published(name, value, changed, tmp_path):
    """heretic #211, PR #332."""
    checkpoint = changed("llama", lambda all: all | {name: torch.full_like(all[name], value)})
    (tmp_path / "out").mkdir()
    with pytest.raises(EditError, match=f"{name} holds NaN or infinite"):
        export_edit(random_edit(checkpoint.config), checkpoint, tmp_path / "out")


def test_a_pointer_of_git_in_place_of_weights_is_told(save_pico, tmp_path):
    """A clone without LFS leaves 130 bytes of text."""
    folder = save_pico("llama").folder
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
    (folder / "model.safetensors").write_text(pointer)
    done = excise("eval", folder, "--concept", "builtin:declining")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"not a safetensors file or is truncated ({len(pointer)} bytes); fetch it again" in done.stderr


def test_a_model_that_is_larger_than_memory_is_refused_before_it_is_loaded(tmp_path):
    """heretic #8: the process was killed."""
    rows = 1 << 32
    config = json.loads((find_model(SMALL_TESTBED).folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = rows * 128 * 2
    entry = {"dtype": "BF16", "shape": [rows, 128], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry} | {"__metadata__": {"format": "pt"}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    # A hole: the file takes no space.
    os.truncate(file, 8 + len(header) + size)
    del config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = excise("eval", tmp_path, "--concept", "builtin:declining", "--dtype", "bfloat16", "--device", "cpu")
    assert done.returncode == 1 and "the model needs 1099.5 GB as bfloat16, cpu has" in done.stderr.splitlines()[-1]


def test_a_device_that_is_not_supported_is_refused_with_those_that_are():
    """heretic #299, transformers #22122: Apple's MPS."""
    done = excise("eval", SMALL_TESTBED, "--concept", "builtin:declining", "--device", "mps")
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and "this machine has none; give auto or cpu" in done.stderr
