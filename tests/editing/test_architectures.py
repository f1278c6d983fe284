import pytest
import torch
from excise.editing.architectures import ARCHITECTURES, architecture_of, layer_selection
from excise.editing.edits.base import edit_model
from excise.editing.errors import RequestError, UnsupportedArchitecture
from excise.editing.hooks.residual_stream import ablated
from excise.editing.wiring.row import classify
from helpers import PICO, make_pico, random_edit


def test_every_row_has_a_pico_model():
    assert set(PICO) == set(ARCHITECTURES)


def test_every_saved_tensor_is_known_and_some_write(architecture, save_pico):
    checkpoint = save_pico(architecture)
    sites = classify(architecture_of(checkpoint.config), list(checkpoint.tensors))
    assert 0 < len(sites) < len(checkpoint.tensors)
    assert {site.layer for site in sites} >= {None, 0, 1}


def test_every_tensor_in_memory_is_known(architecture):
    model = make_pico(architecture)
    sites = classify(architecture_of(model.config.to_dict()), [name for name, _ in model.named_parameters()])
    assert {site.layer for site in sites} >= {None, 0, 1}


def test_gpt2_keys_without_prefix_are_known(save_pico):
    checkpoint = save_pico("gpt2")
    bare = [name.removeprefix("transformer.") for name in checkpoint.tensors]
    row = architecture_of(checkpoint.config)
    assert len(classify(row, bare)) == len(classify(row, list(checkpoint.tensors)))


def test_an_unknown_tensor_is_an_error_and_not_skipped(save_pico):
    checkpoint = save_pico("llama")
    with pytest.raises(UnsupportedArchitecture, match="adapter_out"):
        classify(architecture_of(checkpoint.config), [*checkpoint.tensors, "model.layers.0.adapter_out.weight"])


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_config_without_a_type_is_one_line(config):
    with pytest.raises(UnsupportedArchitecture, match="names no model_type"):
        architecture_of(config)


def test_models_that_no_weight_edit_can_serve_are_refused():
    with pytest.raises(UnsupportedArchitecture, match="do_layer_norm_before"):
        architecture_of({"model_type": "opt", "do_layer_norm_before": False})
    with pytest.raises(UnsupportedArchitecture, match="quantized"):
        architecture_of({"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(UnsupportedArchitecture, match=r"quantized weights \(unknown\)"):
        architecture_of({"model_type": "llama", "quantization_config": "fp8"})


def test_hooks_and_edited_weights_agree(architecture):
    """In pre-norm rows ablating the stream is the same function as the orthogonalized weights."""
    model = make_pico(architecture)
    if ARCHITECTURES[architecture].gain_offset or "post_feedforward_layernorm" in ARCHITECTURES[architecture].sublayers:
        pytest.skip("post-norm: equal up to the norm's scalar only")
    # The hooks leave the unembedding alone, so a tied one must not be edited along.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    config = model.config.to_dict()
    edit = random_edit(config, rank=2)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        with ablated(model, architecture_of(config), edit.basis):
            hooked = model(ids).logits
        edit_model(edit, model, config)
        edited = model(ids).logits
    assert (hooked - before).abs().max() > 1e-2
    assert (hooked - edited).abs().max() < 1e-4


def test_an_edit_of_another_model_is_refused(save_pico):
    checkpoint = save_pico("llama")
    edit = random_edit({"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2})
    with pytest.raises(RequestError, match="width 16"):
        edit.plan(checkpoint.config, list(checkpoint.tensors))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", [0, 1, 2, 3]), ("2", [2]), ("1-2", [1, 2]), ("0.5-1.0", [2, 3]), ("0.25-0.75", [1, 2])],
)
def test_layers_are_chosen_by_number_range_or_depth(text, expected):
    assert layer_selection(text, 4) == expected


@pytest.mark.parametrize("text", ["4", "2-9", "3-1", "middle", "", "0.9-0.95"])
def test_a_choice_that_selects_nothing_is_an_error(text):
    with pytest.raises(RequestError, match="selects nothing"):
        layer_selection(text, 4)
