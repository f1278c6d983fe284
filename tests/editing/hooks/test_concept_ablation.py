"""What training under ablation does to activations and gradients, held against autograd and exact algebra."""

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.directions.sae_latents import SparseLatents
from excise.editing.directions.subspaces import Place, Subspace
from excise.editing.errors import EditError, RequestError
from excise.editing.hooks.concept_ablation import ablation, concept_ablated, in_span
from excise.editing.hooks.residual_stream import read_streams
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from helpers import make_pico

D = 32
IDS = torch.tensor([[5, 9, 33, 7, 60, 2], [8, 4, 4, 71, 3, 90]])


FIRST = Place(0)


def _subspace(place=FIRST, k=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(D, k, generator=generator)
    return Subspace(
        place, basis / basis.norm(dim=0), torch.randn(D, generator=generator), tuple("ab"[:k]), (0.0,) * k, "file"
    )


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("value", ["zero", "mean"])
@pytest.mark.parametrize("mode", ["both", "activations", "gradients"])
def test_each_mode_is_its_formula_forward_and_backward(mode, value):
    subspace = _subspace()
    q = torch.linalg.qr(subspace.basis.double()).Q
    p = q @ q.T
    hidden = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, D, dtype=torch.float64)
    part = in_span(*(x.double() for x in subspace.projector()), subspace.offset.double(), value)
    out = ablation(part, mode)(hidden)
    (gradient,) = torch.autograd.grad(out, hidden, upstream)
    centre = subspace.offset.double() if value == "mean" else torch.zeros(D, dtype=torch.float64)
    ablated = hidden - (hidden - centre) @ p
    expected = hidden if mode == "gradients" else ablated
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    passed = upstream if mode == "activations" else upstream - upstream @ p
    torch.testing.assert_close(gradient, passed, atol=1e-6, rtol=0)
    assert not torch.allclose(upstream, upstream - upstream @ p) and not torch.allclose(hidden, ablated)


@pytest.mark.parametrize(
    "name", sorted(set(ARCHITECTURES) & {"llama", "gpt2", "gemma2", "gpt_neox", "opt", "qwen3_moe"})
)
@pytest.mark.parametrize("site", ["input", "output", "attention", "mlp"])
def test_nothing_of_the_concept_is_left_where_it_is_ablated(name, site):
    model, row = make_pico(name), ARCHITECTURES[name]
    subspace = _subspace(Place(1, site))
    seen = []
    with concept_ablated(model, row, [subspace]) as running:
        layer = model.get_submodule(row.layers)[1]
        inner = {"attention": row.sublayers[0], "mlp": row.sublayers[-1]}.get(site)
        if site == "input":
            layer.register_forward_pre_hook(
                lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            )
        else:
            module = layer.get_submodule(inner) if inner else layer
            module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(input_ids=IDS)
    (hidden,) = seen
    assert running.fired == {Place(1, site): 1}
    assert (hidden @ subspace.basis).abs().max() < 1e-4 * hidden.abs().max() and hidden.abs().max() > 0.01


def test_two_sources_at_one_place_leave_together():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    first, second = _subspace(seed=1), _subspace(seed=2)
    seen = []
    with concept_ablated(model, row, [first, second]):
        model.get_submodule(row.layers)[0].register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(input_ids=IDS)
    for part in (first, second):
        assert (seen[0] @ part.basis).abs().max() < 1e-4


def _ablated(concepts, value="zero"):
    """The ablated stream and the stream before it, at the first layer."""
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    seen = []
    layer = model.get_submodule(row.layers)[0]
    layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with concept_ablated(model, row, concepts, value=value):
        # Hooks run in the order in which they came: one sees the output before the ablation, one after it.
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(input_ids=IDS)
    before, after = seen
    return before.double(), after.double()


def test_a_direction_given_twice_removes_no_other():
    once, twice = _subspace(k=1, place=Place(0, "output")), _subspace(k=1, place=Place(0, "output"))
    before, after = _ablated([once, twice])
    torch.testing.assert_close(after, _ablated([once])[1], atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank((before - after).flatten(0, 1), rtol=1e-4) == 1
    # Two that differ remove two.
    before, after = _ablated([once, _subspace(k=1, seed=4, place=Place(0, "output"))])
    assert torch.linalg.matrix_rank((before - after).flatten(0, 1), rtol=1e-4) == 2


def test_each_of_several_subspaces_gets_its_own_mean():
    first, second = (_subspace(seed=seed, place=Place(0, "output")) for seed in (1, 2))
    _, after = _ablated([first, second], "mean")
    for one in (first, second):
        wanted = (one.basis.T @ one.offset).double().expand(2, 6, 2)
        torch.testing.assert_close(after @ one.basis.double(), wanted, atol=1e-4, rtol=0)
    assert (first.offset - second.offset).abs().max() > 0.5


def test_the_model_is_its_own_again_afterwards_even_after_an_error():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    before, hooks = model(input_ids=IDS).logits, _hooks(model)
    with concept_ablated(model, row, [_subspace()]):
        assert not torch.equal(model(input_ids=IDS).logits, before) and _hooks(model) > hooks
    with pytest.raises(KeyboardInterrupt), concept_ablated(model, row, [_subspace()]):
        raise KeyboardInterrupt
    assert torch.equal(model(input_ids=IDS).logits, before) and _hooks(model) == hooks


def test_gradient_checkpointing_gives_the_same_gradients_and_runs_the_hooks_again():
    def gradients(checkpointing):
        model = make_pico("llama").train()
        adapted = attach(model, AdapterShape(2, 4.0, adapter_modules(model, ARCHITECTURES["llama"], range(2))), seed=0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        with concept_ablated(
            adapted, ARCHITECTURES["llama"], [_subspace(Place(0)), _subspace(Place(1, "attention"))]
        ) as running:
            adapted(input_ids=IDS, labels=IDS).loss.backward()
        found = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
        return found, running.fired

    plain, once = gradients(False)
    again, twice = gradients(True)
    assert plain.abs().max() > 0 and set(once.values()) == {1}
    # What stands inside a layer is computed again, its own input and output are not.
    assert (twice[Place(0)], twice[Place(1, "attention")]) == (1, 2)
    torch.testing.assert_close(plain, again)


def test_a_place_that_no_forward_passed_is_an_error_and_no_forward_at_all_is_none():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    inputs = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with (
        pytest.raises(EditError, match="no forward reached the output of layer 0"),
        concept_ablated(model, row, [_subspace()]),
    ):
        # It stops before the first layer.
        read_streams(model, row, inputs, [0])
    with concept_ablated(model, row, [_subspace()]) as running:
        # A training that is resumed behind its last step takes none.
        pass
    assert running.fired == {Place(0): 0}


@pytest.mark.parametrize("name", ["llama"])
def test_a_compiled_model_is_refused(name):
    model, row = make_pico(name), ARCHITECTURES[name]
    model.compile()
    with pytest.raises(RequestError, match="compiled"), concept_ablated(model, row, [_subspace()]):
        pass


def test_a_layer_that_is_not_there_is_refused():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    with pytest.raises(RequestError, match="there is no layer 7"), concept_ablated(model, row, [_subspace(Place(7))]):
        pass


def test_a_paused_ablation_leaves_the_stream_as_it_is_and_goes_on():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with concept_ablated(model, row, [_subspace()]) as running:
            ablated = model(input_ids=IDS).logits
            with running.pause():
                assert torch.equal(model(input_ids=IDS).logits, plain)
            assert torch.equal(model(input_ids=IDS).logits, ablated) and not torch.equal(ablated, plain)
        assert running.fired == {_subspace().place: 2}


@pytest.mark.parametrize("mode", ["both", "activations", "gradients"])
def test_latents_leave_as_far_as_they_fire_forward_and_backward(mode):
    generator = torch.Generator().manual_seed(5)
    decoder, encoder, bias = (torch.randn(*shape, generator=generator).double() for shape in ((2, D), (D, 2), (2,)))
    latents = SparseLatents(FIRST, (4, 9), decoder, torch.zeros(D), encoder, bias, centred=False)
    hidden = torch.randn(3, 5, D, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 5, D, dtype=torch.float64, generator=generator)
    out = ablation(latents.written, mode)(hidden)
    (gradient,) = torch.autograd.grad(out, hidden, upstream)
    fires = (hidden @ encoder + bias > 0).double()
    expected = hidden if mode == "gradients" else hidden - ((hidden @ encoder + bias) * fires) @ decoder
    torch.testing.assert_close(out, expected)
    passed = upstream if mode == "activations" else upstream - ((upstream @ decoder.T) * fires) @ encoder.T
    torch.testing.assert_close(gradient, passed)
    assert 0 < fires.mean() < 1


def test_latents_share_no_place_and_leave_no_mean():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    latents = SparseLatents(
        FIRST, (0,), torch.ones(1, D), torch.zeros(D), torch.ones(D, 1), torch.ones(1), centred=False
    )
    with concept_ablated(model, row, [latents]) as running:
        model(input_ids=IDS)
    assert running.fired == {FIRST: 1}
    with (
        pytest.raises(RequestError, match="share the output of layer 0"),
        concept_ablated(model, row, [latents, _subspace()]),
    ):
        pass
    with (
        pytest.raises(RequestError, match="value=mean does not work"),
        concept_ablated(model, row, [latents], value="mean"),
    ):
        pass
