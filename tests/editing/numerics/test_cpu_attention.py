"""Attention by matrix products, of a bfloat16 model on a processor."""

import copy

import pytest
import torch
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.numerics.cpu_attention import PRODUCTS, attend_by_products, attention, products_everywhere
from helpers import make_pico
from torch.nn.functional import scaled_dot_product_attention

IDS = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, -4:] = 0
NOT_FUSED = ("gemma2", "gpt_oss")


def _gradients(model):
    model.zero_grad()
    model(input_ids=IDS, attention_mask=MASK).logits[:, :7].float().logsumexp(-1).sum().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def _fused(name):
    """The model as transformers runs it, and as it is trained."""
    model = make_pico(name, torch.bfloat16)
    model.set_attn_implementation("sdpa")
    changed = copy.deepcopy(model)
    attend_by_products(changed)
    return model, changed


def _exact(query, key, value, mask, scale):
    heads = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads, 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _random(dtype, queries=7, keys=9):
    """Two rows, three heads to each of two groups; laid out as projections leave them."""
    generator = torch.Generator().manual_seed(0)

    def heads(count, length, width):
        return torch.randn(2, length, count, width, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()

    mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
    mask[..., 0] = True
    return heads(6, queries, 4), heads(2, keys, 4), heads(2, keys, 5), mask


@pytest.mark.parametrize("block", [1, 300, 1 << 20])
@pytest.mark.parametrize("kind", ["boolean", "added", "of one row", "none"])
def test_products_are_attention_and_its_gradients_however_little_is_held(kind, block):
    query, key, value, mask = _random(torch.float64)
    mask = {"boolean": mask, "added": mask * 3.0, "of one row": mask[:1], "none": None}[kind]
    inputs, weight = (query, key, value), torch.randn(2, 6, 7, 5, dtype=torch.float64)
    ours, wanted = attention(*inputs, mask, 0.3, block), _exact(*inputs, mask, 0.3)
    # Scores go through float32.
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert (ours - attention(*inputs, mask, 0.6, block)).abs().max() > 1e-2
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert other.abs().max() > 1e-2


def test_a_query_that_may_look_nowhere_stays_finite():
    query, key, value, mask = _random(torch.bfloat16)
    mask[0, :, 2] = False
    output = attention(query, key, value, mask, 0.5)
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.float().sum(), (query, key, value)))


def test_without_a_gradient_nothing_changes_unless_asked_and_with_one_it_is_about_as_near_to_float32s(architecture):
    if architecture in NOT_FUSED:
        pytest.skip(f"transformers has no fused attention for {architecture}")
    model, changed = _fused(architecture)
    assert changed.config._attn_implementation == PRODUCTS
    full = copy.deepcopy(model).float()

    def logits(one, mask=MASK):
        with torch.no_grad():
            return one(input_ids=IDS, attention_mask=mask).logits[:, :7].float()

    assert torch.equal(logits(model), logits(changed))
    with products_everywhere():
        by_products, unmasked = logits(changed), logits(changed, None)
        assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    assert torch.equal(logits(model), logits(changed)) and not torch.equal(logits(model), by_products)
    for mask, found in ((MASK, by_products), (None, unmasked)):
        off = (logits(model, mask) - logits(full, mask)).norm()
        assert (found - logits(full, mask)).norm() < 1.5 * off
    exact = _gradients(full)
    plain, ours = (_gradients(m) for m in (model, changed))
    assert not torch.equal(plain, ours)
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() < 0.1 * exact.norm()


def test_attention_that_is_not_fused_is_left_alone():
    model = make_pico("gpt_oss", torch.bfloat16)
    attend_by_products(model)
    assert model.config._attn_implementation == "eager"


def test_only_a_bfloat16_model_on_a_processor_gets_it_and_no_checkpoint_says_so(tmp_path):
    kinds = {
        dtype: load_model(find_model("builtin:testbed"), torch.device("cpu"), dtype).model
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert kinds[torch.bfloat16].config._attn_implementation == PRODUCTS
    assert kinds[torch.float32].config._attn_implementation == "sdpa"
    kinds[torch.bfloat16].save_pretrained(tmp_path)
    assert "excise" not in (tmp_path / "config.json").read_text()
