"""Attention that a bfloat16 model is trained with on a processor."""

import copy

import pytest
import torch
from conftest import make_pico
from excise.artifacts.models import find_model, load_model
from excise.editing.attention import FLOAT32_BACKWARD, train_attention_in_float32

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
    train_attention_in_float32(changed)
    return model, changed


def test_without_a_gradient_nothing_changes_and_with_one_it_is_as_near_to_float32s(architecture):
    if architecture in NOT_FUSED:
        pytest.skip(f"transformers has no fused attention for {architecture}")
    model, changed = _fused(architecture)
    assert changed.config._attn_implementation == FLOAT32_BACKWARD
    with torch.no_grad():
        of_each = [m(input_ids=IDS, attention_mask=MASK).logits for m in (model, changed)]
    assert torch.equal(*of_each)
    exact = _gradients(copy.deepcopy(model).float())
    plain, ours = (_gradients(m) for m in (model, changed))
    assert not torch.equal(plain, ours)
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() < 0.1 * exact.norm()


def test_attention_that_is_not_fused_is_left_alone():
    model = make_pico("gpt_oss", torch.bfloat16)
    train_attention_in_float32(model)
    assert model.config._attn_implementation == "eager"


def test_only_a_bfloat16_model_on_a_processor_gets_it_and_no_checkpoint_says_so(tmp_path):
    kinds = {
        dtype: load_model(find_model("builtin:testbed"), torch.device("cpu"), dtype).model
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert kinds[torch.bfloat16].config._attn_implementation == FLOAT32_BACKWARD
    assert kinds[torch.float32].config._attn_implementation == "sdpa"
    kinds[torch.bfloat16].save_pretrained(tmp_path)
    assert "excise" not in (tmp_path / "config.json").read_text()
