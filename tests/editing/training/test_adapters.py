"""Adapters become updates: merged, exported and loaded through PEFT, they say the same."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.editing.architectures import ARCHITECTURES, layer_count, residual_width
from excise.editing.edits.base import edit_model
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.errors import EditError, RequestError
from excise.editing.training.adapters import (
    AdapterShape,
    adapter_modules,
    adapter_shape,
    attach,
    detach,
    learned_factors,
    loads_in_peft,
    switched_off,
    without_adapter,
)
from helpers import PICO, in_fresh_process, make_pico

INPUTS = {"input_ids": torch.tensor([[5, 9, 7, 3, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def _trained(name, dtype=torch.float32, layers=None):
    """A model with an adapter that has values as if it had been trained."""
    model = make_pico(name, dtype)
    shape = adapter_shape(model, ARCHITECTURES[name], layers or range(2), rank=3, alpha=6.0)
    adapted = attach(model, shape, seed=0)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model, adapted.eval(), shape


def _update(name, factors):
    config = make_pico(name).config.to_dict()
    return LowRankUpdate(factors, config["model_type"], residual_width(config), layer_count(config))


def test_a_merged_update_equals_the_adapter(architecture):
    _, adapted, shape = _trained(architecture)
    with torch.no_grad():
        wanted = adapted(**INPUTS).logits
    update = _update(architecture, learned_factors(adapted, shape))
    plain = make_pico(architecture)
    before = plain(**INPUTS).logits.detach()
    edit_model(update, plain, plain.config.to_dict())
    with torch.no_grad():
        assert torch.allclose(plain(**INPUTS).logits, wanted, atol=1e-4)
        assert (before - wanted).abs().max() > 1e-2


def test_without_its_adapter_the_model_is_the_base_and_detaching_leaves_nothing(architecture):
    base = make_pico(architecture)
    _, adapted, _ = _trained(architecture)
    with torch.no_grad():
        wanted = base(**INPUTS).logits
        with switched_off(adapted):
            assert torch.equal(adapted(**INPUTS).logits, wanted)
        assert not torch.equal(adapted(**INPUTS).logits, wanted)
        plain = detach(adapted)
        assert torch.equal(plain(**INPUTS).logits, wanted)
    assert set(plain.state_dict()) == set(base.state_dict())


def test_only_the_modules_asked_for_are_adapted():
    modules = adapter_modules(make_pico("mixtral"), ARCHITECTURES["mixtral"], [1])
    assert len(modules) == 4 and all(".layers.1.self_attn." in name for name in modules)
    everything = adapter_modules(make_pico("llama"), ARCHITECTURES["llama"], range(2))
    attention = adapter_modules(make_pico("llama"), ARCHITECTURES["llama"], range(2), "attention")
    assert len(everything) == 14 and len(attention) == 8
    with pytest.raises(RequestError, match="fused"):
        adapter_modules(make_pico("gpt_oss"), ARCHITECTURES["gpt_oss"], range(2), "mlp")


def test_an_adapter_on_a_dense_layer_among_experts_lands_there():
    # The library takes these names for those of fused experts in other layers, unless it is kept from it.
    dense = tuple(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
    adapted = attach(make_pico("qwen3_moe"), AdapterShape(2, 2.0, dense), seed=0)
    assert learned_factors(adapted, AdapterShape(2, 2.0, dense)).keys() == {f"{name}.weight" for name in dense}
    # Whoever loads the adapter with the library gets it elsewhere, so it is not published beside the checkpoint.
    assert not loads_in_peft("qwen3_moe", dense)
    assert loads_in_peft("llama", dense)


PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merged = sys.argv[1:4]
ids = torch.tensor([[5, 9, 7, 3, 11]])
with torch.no_grad():
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    adapted = adapted.eval()(input_ids=ids).logits
    whole, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    plain = whole.eval()(input_ids=ids).logits
    untouched = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
moved, merged_moved = (float((adapted - other).abs().max()) for other in (untouched, plain))
print(json.dumps([merged_moved, moved, sorted(info["missing_keys"])]))
"""


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2", "gpt_oss", "mixtral"])
def test_exported_merged_and_as_an_adapter_it_is_the_same_model(name, save_pico, tmp_path):
    checkpoint = save_pico(name)
    _, adapted, shape = _trained(name)
    adapted.save_pretrained(tmp_path / "adapter")
    update = _update(name, learned_factors(adapted, shape))
    save_edit(update, tmp_path / "edit")
    (tmp_path / "merged").mkdir()
    export = export_edit(load_edit(tmp_path / "edit"), checkpoint, tmp_path / "merged")
    assert all(change.changed and change.residual is None for change in export.changes)
    apart, moved, missing = in_fresh_process(PEFT, checkpoint.folder, tmp_path / "adapter", tmp_path / "merged")
    assert apart < 1e-4 < 1e-2 < moved and missing == []


def test_an_update_of_zero_is_an_error(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = checkpoint.tensors[name].shape
    nothing = _update("llama", {name: Factors(torch.zeros(rows, 1), torch.ones(1, columns))})
    with pytest.raises(EditError, match="changed none"):
        export_edit(nothing, checkpoint, tmp_path)


def test_an_update_of_another_model_is_refused_before_anything_is_read():
    update = _update("llama", {"model.layers.7.self_attn.q_proj.weight": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    config = make_pico("llama").config.to_dict()
    with pytest.raises(RequestError, match="no tensor"):
        update.plan(config, list(make_pico("llama").state_dict()))
    with pytest.raises(RequestError, match="learned on a llama"):
        update.plan(make_pico("qwen3").config.to_dict(), list(make_pico("qwen3").state_dict()))


def test_a_damaged_edit_is_one_line(tmp_path):
    update = _update("llama", {"model.layers.0.mlp.up_proj.weight": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    save_edit(update, tmp_path)
    content = json.loads((tmp_path / "edit.json").read_text())
    (tmp_path / "edit.json").write_text(json.dumps({**content, "method": "magic"}))
    with pytest.raises(RequestError, match="low_rank"):
        load_edit(tmp_path)


def test_every_architecture_has_modules_to_adapt():
    for name in PICO:
        assert adapter_modules(make_pico(name), ARCHITECTURES[name], [0])


def test_the_share_of_fused_experts_without_an_adapter_is_told():
    fused = make_pico("gpt_oss", torch.float32)
    layer = fused.model.layers[0]
    held = sum(parameter.numel() for parameter in layer.parameters())
    in_experts = layer.mlp.experts.gate_up_proj.numel() + layer.mlp.experts.down_proj.numel()
    layers, share = without_adapter(fused, ARCHITECTURES["gpt_oss"], [0])
    assert layers == 1 and share == pytest.approx(in_experts / held)
    adapted = adapter_shape(fused, ARCHITECTURES["gpt_oss"], [0], rank=1, alpha=1.0).experts
    assert len(adapted) == 2 and without_adapter(fused, ARCHITECTURES["gpt_oss"], [0], adapted) == (0, 0.0)
    assert without_adapter(make_pico("llama", torch.float32), ARCHITECTURES["llama"], range(2)) == (0, 0.0)
