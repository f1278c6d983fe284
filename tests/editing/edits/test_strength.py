import copy

import pytest
import torch
from excise.editing.edits.base import edit_model
from excise.editing.edits.dense import Delta, DenseUpdate
from excise.editing.edits.in_place import edits_in_place
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.edits.strength import check_has_strength, scaled
from excise.editing.errors import EditError, RequestError
from helpers import PICO, make_pico, random_edit

NAME = "model.layers.1.mlp.down_proj.weight"


def _updates(model):
    torch.manual_seed(1)
    shape = dict(model.named_parameters())[NAME].shape
    low_rank = {NAME: Factors(0.1 * torch.randn(shape[0], 3), torch.randn(3, shape[1]))}
    dense = {NAME: Delta(0.1 * torch.randn(shape))}
    return {
        "low_rank": LowRankUpdate(low_rank, "llama", 32, 2),
        "dense": DenseUpdate(dense, "llama", 32, 2),
        "orthogonalize": random_edit(model.config.to_dict(), rank=2, embedding_strength=0.8),
    }


@pytest.mark.parametrize("kind", ["low_rank", "dense", "orthogonalize"])
def test_a_scaled_edit_lies_on_the_line_between_base_and_edited(kind):
    base, whole, part = make_pico("llama"), make_pico("llama"), make_pico("llama")
    edit, config = _updates(base)[kind], base.config.to_dict()
    edit_model(edit, whole, config)
    edit_model(scaled(edit, 0.3), part, config)
    moved = 0
    for (name, before), after, between in zip(
        base.named_parameters(), whole.parameters(), part.parameters(), strict=True
    ):
        line = before.double() + 0.3 * (after.double() - before.double())
        assert torch.allclose(between.double(), line, atol=1e-6), name
        moved += not torch.equal(before, after)
    assert moved >= 1 and scaled(edit, 1.0) is edit


def test_edits_that_are_all_or_nothing_have_no_strength():
    with pytest.raises(RequestError, match=r"pruned units are removed whole.*lower share"):
        check_has_strength(PrunedUnits({0: (1,)}, {}, "down", "llama", 32, 2, 8))
    check_has_strength(_updates(make_pico("llama"))["dense"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(PICO))
def test_every_try_is_computed_from_the_original_and_the_end_is_the_original(name, dtype):
    model, fresh = make_pico(name, dtype), make_pico(name, dtype)
    before = copy.deepcopy(model.state_dict())
    config, edit = model.config.to_dict(), random_edit(model.config.to_dict())
    edit_model(scaled(edit, 0.5), fresh, config)
    with edits_in_place(model, config, before.__getitem__) as tries:
        for strength in (1.0, 0.2, 0.5):
            tries.apply(scaled(edit, strength))
        # Whatever was tried before leaves no trace.
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters(), strict=True))
        # Adding and subtracting would: this is what a test of the last bit sees.
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_try_that_breaks_off_leaves_the_original():
    model = make_pico("llama")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    huge = LowRankUpdate({NAME: Factors(torch.full((32, 1), 1e30), torch.full((1, 48), 1e30))}, "llama", 32, 2)
    with edits_in_place(model, config, before.__getitem__) as tries:
        tries.apply(random_edit(config))
        with pytest.raises(EditError, match="NaN or infinite"):
            tries.apply(huge)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_edit_that_unties_has_an_unembedding_of_its_own_as_long_as_it_lasts():
    model = make_pico("qwen2")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with edits_in_place(model, config, before.__getitem__) as tries:
        tries.apply(random_edit(config, embeddings="untie"))
        assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
        assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
