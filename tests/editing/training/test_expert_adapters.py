"""Adapters on experts that one tensor holds: what they compute is what the checkpoint says, however it stores experts."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.export import check_shapes, export_edit
from excise.artifacts.checkpoints.heads import plan_edit
from excise.artifacts.checkpoints.read import open_checkpoint, read_tensor
from excise.editing.architectures import ARCHITECTURES, architecture_of, layer_count, residual_width
from excise.editing.edits.dense import Delta, DenseUpdate
from excise.editing.edits.low_rank import ExpertFactors, Factors, LowRankUpdate
from excise.editing.errors import RequestError
from excise.editing.training.adapters import adapter_shape, attach, learned_factors, update_rms
from excise.editing.wiring.derived import derived_row
from excise.editing.wiring.experts import StoredPiece
from excise.editing.wiring.row import ExpertPart
from excise.editing.wiring.small_copy import small_copy
from helpers import make_pico
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

RANK, ALPHA = 3, 12.0
ROWS = ("mixtral", "qwen3_moe", "gpt_oss")
DERIVED = ("qwen2_moe", "granitemoe", "deepseek_v3", "llama4_text")


def _model(name):
    if name in ROWS:
        return make_pico(name)
    return small_copy(AutoConfig.for_model(name).to_dict())


def _adapted(model, experts=True):
    config = json.loads(model.config.to_json_string(use_diff=False))
    row, layers = architecture_of(config), range(layer_count(config))
    shape = adapter_shape(model, row, layers, rank=RANK, alpha=ALPHA, experts=experts)
    adapted = attach(model, shape, seed=0)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return adapted.eval(), shape


def _update(config, factors):
    return LowRankUpdate(factors, config["model_type"], residual_width(config), layer_count(config))


@torch.no_grad()
def _logits(model):
    return model(input_ids=torch.tensor([[5, 9, 7, 3, 11]]), use_cache=False).logits


def _naive(adapter, name, experts, inputs_first):
    """scale * B_e A_e of each expert, number by number from the library's file, in float64."""
    module, parameter = name.rsplit(".", 1)
    # The wrappers of a module's two parameters stand one inside the other: gate_up_proj comes first, so it is inside.
    inner = f"base_model.model.{module}" + {"gate_up_proj": ".base_layer", "down_proj": ""}[parameter]
    a, b = (adapter[f"{inner}.lora_{part}.weight"].double() for part in "AB")
    deltas = []
    for expert in range(experts):
        delta = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
        for k in range(RANK):
            delta += ALPHA / RANK * torch.outer(b[:, k * experts + expert], a[expert * RANK + k])
        deltas.append(delta.T if inputs_first else delta)
    return deltas


STORED = {
    # Where a checkpoint holds expert 1 of gate_up_proj: the names of its tensors, one after the other along the rows.
    "mixtral": ["model.layers.1.block_sparse_moe.experts.1.w1.weight", "model.layers.1.block_sparse_moe.experts.1.w3.weight"],
    "qwen3_moe": ["model.layers.2.mlp.experts.1.gate_proj.weight", "model.layers.2.mlp.experts.1.up_proj.weight"],
    "gpt_oss": ["model.layers.1.mlp.experts.gate_up_proj"],
    "qwen2_moe": ["model.layers.1.mlp.experts.1.gate_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_each_stored_expert_gets_its_own_product(name, tmp_path):
    model = _model(name)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    base = open_checkpoint(tmp_path / "base")
    assert len(base.shards) > 1
    adapted, shape = _adapted(model)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    (tmp_path / "out").mkdir()
    export_edit(_update(base.config, learned_factors(adapted, shape)), base, tmp_path / "out")
    layer = STORED[name][0].split(".")[2]
    parameter = f"model.layers.{layer}.mlp.experts.gate_up_proj"
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    wanted = _naive(saved, parameter, shape.experts[parameter], name == "gpt_oss")[1]
    edited = open_checkpoint(tmp_path / "out")

    def matrix(checkpoint):
        parts = [read_tensor(checkpoint.tensors[stored]).double() for stored in STORED[name]]
        return torch.cat([part[1] if part.dim() == 3 else part for part in parts])

    difference = matrix(edited) - matrix(base)
    assert wanted.abs().max() > 1e-2
    assert torch.allclose(difference, wanted, atol=1e-6)


@pytest.mark.parametrize("name", [*ROWS, *DERIVED])
def test_the_adapter_is_the_checkpoint_that_is_opened_again(name, tmp_path):
    model = _model(name)
    before = _logits(model)
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    adapted, shape = _adapted(model)
    assert shape.experts
    wanted = _logits(adapted)
    base = open_checkpoint(tmp_path / "base")
    save_edit(_update(base.config, learned_factors(adapted, shape)), tmp_path / "edit")
    (tmp_path / "out").mkdir()
    plan = plan_edit(load_edit(tmp_path / "edit"), base)
    check_shapes(base, plan)
    export = export_edit(load_edit(tmp_path / "edit"), base, tmp_path / "out")
    assert all(change.changed for change in export.changes)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.dist(_logits(again.eval()), wanted) < 1e-4 * wanted.norm() < 1e-2 * torch.dist(before, wanted)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_are_left_out_stay_bit_for_bit(name, tmp_path):
    model = _model(name)
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    adapted, shape = _adapted(model, experts=False)
    assert not shape.experts
    (tmp_path / "out").mkdir()
    export_edit(_update(base.config, learned_factors(adapted, shape)), base, tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    for stored in base.tensors:
        same = torch.equal(read_tensor(base.tensors[stored]), read_tensor(edited.tensors[stored]))
        assert same == ("self_attn" not in stored or not stored.endswith("proj.weight")), stored


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_table_say_what_a_small_copy_shows(name):
    assert derived_row({"model_type": name}).fused == ARCHITECTURES[name].fused


PIECES = list(itertools.product((-2, -1), (False, True), (False, True), (None, 1)))


@pytest.mark.parametrize(("axis", "interleaved", "transposed", "expert"), PIECES)
def test_a_piece_of_the_factors_is_the_piece_of_their_product(axis, interleaved, transposed, expert):
    torch.manual_seed(0)
    factors = ExpertFactors(torch.randn(3, 8, 2), torch.randn(3, 2, 6))
    whole = factors.left @ factors.right
    seen = []
    for index in range(2):
        piece = StoredPiece("any", expert, ExpertPart("any", axis, index, 2, interleaved, transposed))
        part = factors.piece(piece)
        product = part.left @ part.right
        assert torch.allclose(product, piece.of(whole), atol=1e-6)
        assert torch.equal(Delta(whole).piece(piece).values, piece.of(whole))
        seen.append(product.mT if transposed else product)
    # Both halves together are the whole, as the layout says.
    if interleaved:
        together = torch.stack(seen, axis if axis == -1 else -2).flatten(
            axis - 1 if axis == -1 else -3, axis if axis == -1 else -2
        )
    else:
        together = torch.cat(seen, axis)
    assert torch.allclose(together, whole if expert is None else whole[expert], atol=1e-6)


def test_whole_experts_that_were_trained_land_in_every_stored_part(tmp_path):
    model = _model("qwen3_moe")
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    base = open_checkpoint(tmp_path / "base")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    delta = torch.randn_like(model.get_parameter(name))
    update = DenseUpdate({name: Delta(delta)}, "qwen3_moe", 32, 3)
    save_edit(update, tmp_path / "edit")
    (tmp_path / "out").mkdir()
    export_edit(load_edit(tmp_path / "edit"), base, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(again.get_parameter(name), model.get_parameter(name) + delta, atol=1e-6)


def test_a_base_with_other_experts_is_refused_before_a_weight_is_read(tmp_path):
    model = _model("mixtral")
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    name = "model.layers.0.mlp.experts.down_proj"
    good = ExpertFactors(torch.ones(3, 32, 1), torch.ones(3, 1, 48))
    check_shapes(base, plan_edit(_update(base.config, {name: good}), base))
    more = replace(good, left=torch.ones(4, 32, 1), right=torch.ones(4, 1, 48))
    with pytest.raises(RequestError, match=r"the base has 3 experts in .*down_proj, but the update has 4"):
        plan_edit(_update(base.config, {name: more}), base)
    with pytest.raises(RequestError, match="has 48 columns, but the update has 40"):
        check_shapes(base, plan_edit(_update(base.config, {name: replace(good, right=torch.ones(3, 1, 40))}), base))
    # A pair for one matrix is no update of experts that stand one by one.
    with pytest.raises(RequestError, match="has no tensor"):
        plan_edit(_update(base.config, {name: Factors(torch.ones(32, 1), torch.ones(1, 48))}), base)


@pytest.mark.parametrize("name", ROWS)
def test_the_root_mean_square_of_an_update_counts_every_expert(name):
    adapted, shape = _adapted(_model(name))
    size = update_rms(adapted, shape)
    factors = learned_factors(adapted, shape)
    sums = [(one.left.double() @ one.right.double()).square().sum() for one in factors.values()]
    count = sum((one.left @ one.right).numel() for one in factors.values())
    assert shape.experts and size.item() == pytest.approx(float((sum(sums) / count).sqrt()), rel=1e-5)
    assert size.requires_grad and size > 1e-4
