"""Layers of fewer operations say what the library's say, and so do their gradients; what is not known keeps its own."""

import pytest
import torch
from excise.editing.training.fewer_operations import fewer_operations
from excise.editing.training.packing import packed, packing, read_packed
from excise.editing.training.rms_norm import rms_norm
from excise.editing.training.rotary import rotated
from helpers import PICO, make_pico
from transformers import AutoConfig, AutoModelForCausalLM

KNOWN = {
    "llama": (4, 1),
    "mistral": (4, 1),
    "qwen2": (4, 1),
    "qwen3": (6, 1),
    "phi3": (2, 1),
    "olmo2": (1, 0),
    "gpt2": (0, 0),
}
"""Modules of a layer that are known, and of the rest."""
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def _model(name, dtype=torch.float64, **changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**PICO[name], **changed})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(dtype)


def _found(model):
    """Logits, and gradients of all parameters."""
    model.zero_grad()
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    logits.double().log_softmax(-1)[..., :7].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", KNOWN)
def test_what_layers_say_and_their_gradients_stay(name):
    model = _model(name)
    usual = _found(model)
    with fewer_operations(model) as count:
        in_layer, beside = KNOWN[name]
        assert count == in_layer * model.config.num_hidden_layers + beside
        found = _found(model)
    for one, other in zip(found, usual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # Afterwards nothing is left of it.
    assert all(torch.equal(one, other) for one, other in zip(_found(model), usual, strict=True))


def test_a_module_that_does_anything_else_keeps_its_own():
    model = _model("llama")
    norm, gated = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    library = type(norm)

    class Other(library):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm.__class__ = Other
    gated.forward = lambda x: 0 * x
    usual = _found(model)[0]
    with fewer_operations(model):
        torch.testing.assert_close(_found(model)[0], usual)
    assert gated.forward(torch.ones(1)) == 0
    norm.__class__ = library
    assert not torch.allclose(_found(model)[0], usual)


def test_what_is_read_on_from_a_cache_is_the_librarys():
    model = _model("qwen3")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        with fewer_operations(model):
            first = model(input_ids=IDS[:, :5], use_cache=True)
            rest = model(input_ids=IDS[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-5, atol=1e-6)


def test_hooks_see_what_they_saw():
    model, seen = _model("llama"), []
    modules = [model.model.layers[0].mlp.gate_proj, model.model.layers[1].self_attn.k_proj, model.model.norm]
    handles = [module.register_forward_hook(lambda *parts: seen.append(parts[2])) for module in modules]
    _found(model)
    with fewer_operations(model):
        _found(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == 6
    for one, other in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norm_and_rotation_by_their_definitions(dtype):
    exact = 1e-6 if dtype == torch.float64 else 0.01
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 4, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(8, generator=generator).to(dtype).requires_grad_()
    angle = torch.randn(2, 300, 4, generator=generator).double()
    cos, sin = (torch.cat((part, part), -1).to(dtype) for part in (angle.cos(), angle.sin()))
    double = [one.detach().double().requires_grad_() for one in (x, weight)]
    pairs = (
        torch.complex(double[0][..., :4], double[0][..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    )
    wanted = [
        double[1] * double[0] / (double[0].square().mean(-1, keepdim=True) + 1e-3).sqrt(),
        torch.cat((pairs.real, pairs.imag), -1),
    ]
    for one, other, about in zip((rms_norm(x, weight, 1e-3), rotated(x, cos, sin)), wanted, (2, 1), strict=True):
        upstream = torch.randn(one.shape, generator=generator).to(dtype)
        found = [one, *torch.autograd.grad(one, (x, weight)[:about], upstream)]
        right = [other, *torch.autograd.grad(other, double[:about], upstream.double())]
        for mine, his in zip(found, right, strict=True):
            assert mine.dtype == dtype and (mine.double() - his).norm() < exact * his.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_attention_over_a_packed_row_is_that_of_each_sequence(name, dtype):
    exact = 1e-5 if dtype == torch.float64 else 0.05
    model = _model(name, dtype, **({"sliding_window": 4} if name == "mistral" else {}))
    rows = [(5, 6, 7, 8, 9, 10), (5, 6, 7, 11), (12,), tuple(range(20, 60))]

    def gradients(states):
        table = model.get_input_embeddings().weight
        return torch.autograd.grad((states.double() * weights).sum(), [table, *model.base_model.parameters()][:6])

    alone = torch.cat([model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows])
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1)).double()
    usual = [alone.detach(), *gradients(alone)]
    with packing(model) as can:
        assert can
        inputs = packed(rows)
        together = read_packed(model, inputs)[inputs["where"]]
        found = [together.detach(), *gradients(together)]
    for one, other in zip(found, usual, strict=True):
        assert (one.double() - other.double()).norm() < exact * other.double().norm() > 0


def test_a_pico_model_of_every_family_is_as_it_was_afterwards(architecture):
    model = make_pico(architecture)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with fewer_operations(model):
        pass
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}
