"""Adapters and quantized checkpoints for the fuzzer: a valid example of each, and the reader that a command calls."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from excise.artifacts.checkpoints.adapter import adapter_edit, read_adapter
from excise.artifacts.checkpoints.dequantize import write_dequantized
from excise.artifacts.checkpoints.export import check_editable, check_shapes, export_edit
from excise.artifacts.checkpoints.quantized import quantization_of, read_quantized
from excise.artifacts.checkpoints.read import Checkpoint, open_checkpoint
from excise.editing.edits.adapter_merge import (
    AdapterMerge,
    InTurn,
    Replaced,
    ReplacedRows,
    Rescaled,
)
from excise.editing.edits.base import WeightEdit
from excise.editing.edits.low_rank import ExpertFactors, Factors
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LAYER, EMBEDDING, NORM = "model.layers.0.", "model.embed_tokens", "model.norm.weight"


def small_model(folder: Path) -> None:
    """A random Llama of two layers, in two shards."""
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_adapter(folder: Path) -> None:
    """A base, and a LoRA with DoRA, tokens and a norm that was trained whole."""
    small_model(folder / "base")
    inner = folder / "adapter"
    inner.mkdir()
    query = f"base_model.model.{LAYER}self_attn.q_proj"
    tensors = {
        f"{query}.lora_A.weight": _random(4, 32),
        f"{query}.lora_B.weight": _random(32, 4),
        f"{query}.lora_magnitude_vector": _random(32).abs(),
        f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta": _random(2, 32),
        f"base_model.model.{NORM}": _random(32),
    }
    save_file(tensors, inner / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True, "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {r".*\.q_proj": 3}, "trainable_token_indices": [3, 9], "modules_to_save": ["norm"],
        "base_model_name_or_path": "base", "target_parameters": None, "bias": "none", "use_rslora": False,
    }  # fmt: skip
    (inner / "adapter_config.json").write_text(json.dumps(config))


def read_and_merge(folder: Path) -> None:
    """What ``excise apply ADAPTER`` does."""
    checkpoint = open_checkpoint(folder / "base")
    _export(adapter_edit(read_adapter(folder / "adapter", "adapter"), checkpoint), checkpoint)


def _export(edit: WeightEdit, checkpoint: Checkpoint) -> None:
    plan = edit.plan(checkpoint.config, list(checkpoint.tensors))
    check_editable(checkpoint, plan)
    check_shapes(checkpoint, plan)
    with tempfile.TemporaryDirectory() as out:
        export_edit(edit, checkpoint, Path(out))


def adapter_edit_example() -> AdapterMerge:
    """Every kind of step."""
    factors = Factors(_random(32, 2), _random(2, 32))
    updates = {
        f"{LAYER}self_attn.q_proj.weight": factors,
        f"{LAYER}self_attn.o_proj.weight": Rescaled(Factors(_random(32, 2), _random(2, 32)), _random(32).abs()),
        f"{EMBEDDING}.weight": InTurn(
            Replaced(_random(96, 32)), ReplacedRows(torch.tensor([3, 9]), _random(2, 32), 96)
        ),
        f"{LAYER}mlp.experts.down_proj": ExpertFactors(_random(2, 32, 2), _random(2, 2, 48)),
    }
    return AdapterMerge(updates, "llama", 32, 2)


def make_quantized(method: str) -> Callable[[Path], None]:
    """A function that writes a checkpoint of this ``quant_method``."""

    def make(folder: Path) -> None:
        small_model(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": ABOUT[method]}))
        (folder / "model.safetensors.index.json").unlink()
        for path in folder.glob("model-*.safetensors"):
            path.unlink()
        save_file(TENSORS[method](), folder / "model.safetensors", {"format": "pt"})

    return make


def _fp8() -> dict[str, torch.Tensor]:
    name = f"{LAYER}mlp.up_proj.weight"
    return {
        name: _random(48, 32).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": _random(3, 2),
        f"{LAYER}mlp.up_proj.input_scale": torch.ones(()),
        NORM: _random(32),
    }


def _mxfp4() -> dict[str, torch.Tensor]:
    name = f"{LAYER}mlp.experts.down_proj"
    codes = torch.randint(0, 255, (2, 32, 2, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": 120 + codes[..., 0] % 8, NORM: _random(32)}


def _packed() -> dict[str, torch.Tensor]:
    name = f"{LAYER}mlp.up_proj"
    words = torch.randint(-(2**31), 2**31 - 1, (48, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": _random(48, 2),
        f"{name}.weight_zero_point": words[:6, :2].contiguous(),
        f"{name}.weight_g_idx": (torch.arange(32) // 16).int(),
        f"{name}.weight_shape": torch.tensor([48, 32]),
        NORM: _random(32),
    }


TENSORS = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _packed}
ABOUT = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16}, "format": None}},
        "sparsity_config": {"format": "dense"},
    },
}


def dequantize(folder: Path) -> None:
    """What every command does with such a model."""
    checkpoint = open_checkpoint(folder)
    quantization_of(checkpoint.config)
    quantized = read_quantized(checkpoint, "model")
    if quantized is not None:
        with tempfile.TemporaryDirectory() as out:
            write_dequantized(checkpoint, quantized, Path(out), "model")
