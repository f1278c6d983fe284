"""Rows that are found out on a small copy: held against the table, against other code's hooks, and against faults."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.proof import check_proved, prove
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.source import BUILTIN, read_record
from excise.editing.architectures import ARCHITECTURES, architecture_of, layer_count, residual_width
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.edits.subspace_removal import Edit
from excise.editing.errors import RequestError, UnsupportedArchitecture
from excise.editing.modules import final_hidden, unembedding
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach, learned_factors
from excise.editing.wiring import derived, small_copy
from excise.editing.wiring.row import classify, left_alone
from helpers import PICO
from transformers import AutoConfig

OWN_ROWS = ("architectures", "derived", "readers", "tied", "spellings", "ignored", "refused", "unembedding")


def config_of(model_type: str, **options: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(AutoConfig.for_model(model_type, **options).to_json_string(use_diff=False))
    return config


HYBRID = {"num_hidden_layers": 8, "layer_types": ["mamba", "attention"] * 4}
TYPES: dict[str, dict[str, Any]] = {
    "smollm3": {}, "gemma3": {}, "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
    "moe_intermediate_size": 704}, "qwen3_5_moe": {}, "nemotron_h": {}, "deepseek_v3": {}, "llama4": {}, "bloom": {},
    "phi": {}, "gptj": {}, "cohere2": {}, "granitemoehybrid": HYBRID, "falcon_h1": {}, "mistral3": {}, "lfm3": {},
    "minimax_m2": {}, "mpt": {}, "nanochat": {},
}  # fmt: skip
"""Types without a row, of every kind: behind norms, hybrid, of experts, nested, renamed on disk, with several norms."""
WITHOUT_A_ROW = pytest.mark.parametrize("model_type", sorted(TYPES))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_what_is_found_out_is_what_the_table_says(model_type):
    config, row = config_of(model_type), ARCHITECTURES[model_type]
    found = derived.derived_row(config)
    stored = {pattern for pattern, _ in _writers(found)}
    # The table also names biases that the released models do not have.
    assert {(pattern, rest) for pattern, rest in _writers(row) if pattern in stored} == set(_writers(found))
    assert found.sublayers == row.sublayers
    assert (found.layers, found.embedding) == (row.layers, row.embedding)
    assert (found.attention_units, found.mlp_units) == (row.attention_units, row.mlp_units)
    assert set(found.mlp_inputs) == (set(row.mlp_inputs) if row.mlp_units else set())


def _writers(row):
    return [(writer.pattern, (writer.axis, writer.kind, writer.gains, row.gain_offset)) for writer in row.writers]


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_rows_of_the_table_are_proved_on_disk(model_type):
    proof = prove(config_of(model_type))
    assert (proof.row, proof.proved, proof.reason) == ("table", True, None)
    assert proof.residual is not None and proof.residual < 1e-5


@WITHOUT_A_ROW
def test_types_without_a_row_are_derived_and_proved_on_disk(model_type):
    proof = prove(config_of(model_type, **TYPES[model_type]))
    assert (proof.row, proof.proved, proof.reason) == ("derived", True, None)
    assert proof.residual is not None and proof.residual < 1e-5


def test_a_type_whose_residual_passes_through_a_norm_is_refused_with_what_is_left():
    """minimax adds what its norm returns: gains mix the stream itself, and no edit of writers is exact."""
    with pytest.raises(UnsupportedArchitecture, match=r"layer \d still holds 0\.\d+ of the direction"):
        check_proved(config_of("minimax"))


def test_a_row_that_forgets_a_writer_is_not_proved(monkeypatch):
    row = ARCHITECTURES["starcoder2"]
    forgotten = [writer for writer in row.writers if not writer.pattern.endswith("c_proj.bias")]
    readers = (*row.readers, "model.layers.{layer}.mlp.c_proj.bias")
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", replace(row, writers=tuple(forgotten), readers=readers))
    proof = prove(config_of("starcoder2"))
    assert not proof.proved
    assert "still holds" in (proof.reason or "")


def test_a_type_that_transformers_does_not_know_is_one_line():
    with pytest.raises(UnsupportedArchitecture, match="'nonsense' is not known to transformers"):
        architecture_of({"model_type": "nonsense"})


def test_encoder_decoders_are_refused():
    with pytest.raises(UnsupportedArchitecture, match="an encoder and a decoder"):
        architecture_of(config_of("bart"))


@WITHOUT_A_ROW
def test_the_unembedding_gives_the_models_own_logits(model_type):
    """Scales and caps of logits differ from type to type; soft-target losses go through this function."""
    model = small_copy.small_copy(config_of(model_type, **TYPES[model_type]))
    inputs = small_copy.inputs_of(model)
    with torch.no_grad():
        own = model(**inputs, use_cache=False).logits
        ours = unembedding(model)(final_hidden(model, inputs))
    assert torch.dist(own, ours) <= 1e-5 * own.norm()


@WITHOUT_A_ROW
def test_adapters_go_on_every_part_and_merge_to_what_they_compute(model_type):
    config = config_of(model_type, **TYPES[model_type])
    model, row = small_copy.small_copy(config), architecture_of(config)
    inputs = small_copy.inputs_of(model)
    names = adapter_modules(model, row, range(len(model.get_submodule(row.layers))))
    shape = AdapterShape(2, 4.0, names)
    adapted = attach(model, shape, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        through_adapter = adapted(**inputs, use_cache=False).logits
        factors = learned_factors(adapted, shape)
        base = adapted.unload()
        before = base(**inputs, use_cache=False).logits
        for name, factor in factors.items():
            base.get_parameter(name).add_(factor.left @ factor.right)
        merged = base(**inputs, use_cache=False).logits
    assert torch.dist(through_adapter, before) > 1e-3 * before.norm()
    assert torch.dist(through_adapter, merged) < 1e-4 * before.norm()


@pytest.mark.parametrize("model_type", ["smollm3", "phi", "gptj", "mpt", "falcon_h1"])
def test_pruned_neurons_on_disk_are_neurons_that_hooks_silence(model_type, tmp_path):
    config = config_of(model_type, **TYPES[model_type])
    model, row = small_copy.small_copy(config), architecture_of(config)
    inputs = small_copy.inputs_of(model)
    assert row.mlp_units is not None
    layers = model.get_submodule(row.layers)
    handles = [
        layer.get_submodule(row.mlp_units).register_forward_pre_hook(lambda _, args: (_silenced(args[0]), *args[1:]))
        for layer in layers
    ]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    checkpoint = open_checkpoint(tmp_path / "base")
    width, depth = residual_width(checkpoint.config), layer_count(checkpoint.config)
    edit = PrunedUnits(
        dict.fromkeys(range(depth), (1, 5)), {}, "down", checkpoint.config["model_type"], width, depth, 1
    )
    (tmp_path / "edited").mkdir()
    export_edit(edit, checkpoint, tmp_path / "edited")
    loaded = type(model).from_pretrained(tmp_path / "edited", dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.dist(loaded(**inputs, use_cache=False).logits, expected) < 1e-5 * expected.norm()


def _silenced(values: torch.Tensor) -> torch.Tensor:
    silenced = values.clone()
    silenced[..., [1, 5]] = 0
    return silenced


def test_tensors_that_predict_further_tokens_are_left_and_named():
    config = config_of("deepseek_v3")
    row, depth = architecture_of(config), layer_count(config)
    # transformers reads no layer 61 of DeepSeek-V3, which stores one for prediction.
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(62)]
    assert depth == 61
    assert {site.layer for site in classify(row, names, depth)} == set(range(61))
    assert left_alone(row, names, depth) == ["model.layers.61.self_attn.o_proj.weight"]


def test_a_layer_beyond_the_configured_count_is_one_line(save_pico):
    checkpoint = save_pico("llama")
    names = [*checkpoint.tensors, "model.layers.2.self_attn.o_proj.weight"]
    edit = Edit(torch.eye(32)[:, :1], "llama", (1.0, 1.0))
    with pytest.raises(RequestError, match=r"stores model\.layers\.2\.self_attn\.o_proj\.weight.*counts 2 layers"):
        edit.plan(checkpoint.config, names)


def test_a_name_like_one_that_is_ignored_is_still_edited():
    """GPT-2 leaves out ``attn.bias``, which as an expression also matches ``attn.c_attn.bias``."""
    row = derived.derived_row(config_of("gpt2"))
    names = ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_proj.bias", "transformer.h.0.attn.bias"]
    assert left_alone(row, names, 1) == ["transformer.h.0.attn.bias"]
    assert [site.name for site in classify(row, names, 1)] == ["transformer.h.0.attn.c_proj.bias"]


def test_small_copies_have_every_kind_of_layer():
    config = config_of("granitemoehybrid", **HYBRID)
    small = small_copy.small_config(config)
    assert set(small.layer_types) == set(config["layer_types"])
    assert PICO.keys() == ARCHITECTURES.keys()


def test_the_record_that_is_listed_proves_every_row_of_the_table():
    """``benchmarks/architectures.py --json`` wrote it; the page of the documentation is made from the same figures."""
    records = {record["type"]: record for record in read_record(BUILTIN / "architectures.json")}
    assert records.keys() >= ARCHITECTURES.keys() | TYPES.keys()
    assert all(records[name]["proved"] and records[name]["row"] == "table" for name in ARCHITECTURES)
    assert all(records[name]["proved"] and records[name]["row"] == "derived" for name in TYPES)
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert all(f"| {name} |" in page for name in records)


@pytest.mark.parametrize("model_type", ["git", "idefics", "evolla"])
def test_a_tower_beside_the_language_models_options_is_shrunk_once(model_type):
    full = AutoConfig.for_model(model_type)
    small = small_copy.small_config(config_of(model_type))
    towers = [key for key in full.sub_configs if hasattr(getattr(full, key, None), "num_attention_heads")]
    for key in towers or pytest.fail("it has no tower"):
        one, other = getattr(full, key), getattr(small, key)
        assert other.num_attention_heads == one.num_attention_heads and other.hidden_size < one.hidden_size
        assert other.hidden_size % other.num_attention_heads == 0


def test_rows_of_small_experts_are_what_grouped_products_take():
    # A head of 144 makes other sizes uneven.
    config = config_of("dots1", n_routed_experts=128, n_group=1, topk_group=1, moe_intermediate_size=1408)
    assert 1408 // (4608 // 32 // small_copy.HEAD) % 8
    assert small_copy.small_config(config).moe_intermediate_size % 8 == 0
