"""Strength and layers hold for every writer to the residual stream, the embeddings among them."""

import pytest
import torch
from excise.editing.architectures import architecture_of
from excise.editing.edits.base import edit_model
from excise.editing.edits.subspace_removal import Edit
from excise.editing.errors import RequestError
from excise.editing.wiring.row import classify
from helpers import make_pico, random_edit

PLAIN = ("gpt2", "llama", "mixtral", "opt")
"""Rows without a gain behind a writer, so that what is left shows in the weight itself."""


def _left(name, by_kind=False, **options):
    """Share of the component left in each writer after an edit, by layer; None for the embeddings.

    With ``by_kind`` the largest share of each kind of writer, a list with one number for each layer.
    """
    model = make_pico(name)
    config = model.config.to_dict()
    edit = random_edit(config, **options)
    before = {key: value.clone() for key, value in model.named_parameters()}
    edit_model(edit, model, config)
    left = {}
    for site in classify(architecture_of(config), list(before)):
        old, new = (_component(values[site.name], site, edit) for values in (before, dict(model.named_parameters())))
        left.setdefault((site.writer.kind, site.layer) if by_kind else site.layer, []).append(float(new / old))
    if by_kind:
        return {kind: [max(left[kind, layer]) for layer in (0, 1)] for kind in ("attention", "mlp")}
    return left


def _component(weight, site, edit, basis=None):
    along_rows, basis = site.writer.axis == -1 or weight.dim() == 1, edit.basis if basis is None else basis
    return (weight @ basis if along_rows else weight.mT @ basis).detach().norm()


@pytest.mark.parametrize("name", PLAIN)
def test_a_weak_edit_is_weak_at_the_embeddings_too(name):
    left = _left(name, strength=0.25)
    assert None in left and len(left) > 2
    for shares in left.values():
        assert shares == pytest.approx([0.75] * len(shares), abs=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_embeddings_go_with_layer_0_and_a_setting_of_their_own_says_otherwise(name):
    later = _left(name, layer_strengths=(0.0, 1.0))
    assert later[None] == pytest.approx([1.0] * len(later[None])) and max(later[1]) < 1e-5
    first = _left(name, layer_strengths=(1.0, 0.0))
    assert max(first[None]) < 1e-5 and min(first[1]) == 1.0
    otherwise = _left(name, layer_strengths=(0.0, 1.0), embedding_strength=0.5)
    assert otherwise[None] == pytest.approx([0.5] * len(otherwise[None]), abs=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_mlps_lose_their_own_share_where_the_edit_says_so(name):
    """Beside it, without a word on MLPs, both writers of a layer lose the same."""
    together = _left(name, layer_strengths=(1.0, 0.5), embedding_strength=0.0, by_kind=True)
    for shares in together.values():
        assert shares == pytest.approx([0.0, 0.5], abs=1e-4)
    apart = _left(name, layer_strengths=(1.0, 0.5), embedding_strength=0.0, mlp_strengths=(0.0, 0.25), by_kind=True)
    assert apart["attention"] == pytest.approx([0.0, 0.5], abs=1e-4)
    assert apart["mlp"] == pytest.approx([1.0, 0.75], abs=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_each_layer_loses_its_own_subspace_where_there_is_one_a_layer(name):
    model = make_pico(name)
    config, before = model.config.to_dict(), {key: value.clone() for key, value in model.named_parameters()}
    bases = torch.linalg.qr(torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(1))).Q
    edit = random_edit(config, rank=2, layer_bases=bases)
    edit_model(edit, model, config)
    for site in classify(architecture_of(config), list(before)):
        places = {None: edit.basis, 0: bases[0], 1: bases[1]}
        left = {
            layer: _component(dict(model.named_parameters())[site.name], site, edit, basis)
            / _component(before[site.name], site, edit, basis)
            for layer, basis in places.items()
        }
        own = left.pop(site.layer)
        # A bias of two components can lose most of another plane by chance.
        assert own < 1e-5 and min(left.values()) > 0.3 - 0.3 * site.name.endswith("bias")


def test_bases_of_another_number_of_layers_or_not_orthonormal_are_refused():
    bases = torch.eye(32, 1).expand(3, 32, 1)
    with pytest.raises(RequestError, match="2 strengths of layers and 3 bases of layers"):
        Edit(torch.eye(32, 1), "llama", (0.0, 1.0), layer_bases=bases)
    for wrong in (2 * bases[:2], bases[:2] * torch.nan):
        with pytest.raises(RequestError, match="is not orthonormal"):
            Edit(torch.eye(32, 1), "llama", (0.0, 1.0), layer_bases=wrong)
    assert Edit(torch.eye(32, 1), "llama", (0.0, 1.0), layer_bases=bases[:2]).basis_at(None).shape == (32, 1)


def test_layers_that_lose_nothing_are_not_declared():
    edit = Edit(torch.eye(32, 1), "llama", (0.0, 1.0), embedding_strength=0.0, mlp_strengths=(0.0, 0.0))
    names = [name for name, _ in make_pico("llama").named_parameters()]
    declared = edit.plan(make_pico("llama").config.to_dict(), names).declared
    assert declared and {name.rpartition(".")[0] for name in declared} == {"model.layers.1.self_attn.o_proj"}


def test_mlps_of_another_number_of_layers_are_refused():
    with pytest.raises(RequestError, match="2 strengths of layers and 1 of MLPs"):
        Edit(torch.eye(32, 1), "llama", (0.0, 1.0), mlp_strengths=(1.0,))


def test_embeddings_that_are_untied_for_nothing_are_refused():
    config = {**make_pico("gpt2").config.to_dict()}
    names = [name for name, _ in make_pico("gpt2").named_parameters()]
    edit = Edit(torch.eye(32, 1), "gpt2", (0.0, 1.0), embeddings="untie")
    with pytest.raises(RequestError, match="set embedding_strength, select layer 0"):
        edit.plan(config, names)
    assert Edit(torch.eye(32, 1), "gpt2", (0.0, 1.0), "untie", 1.0).plan(config, names).unties
