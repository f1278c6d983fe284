"""Attackers that read their sequences as one row learn what they learn of padded rows."""

import collections

import pytest
import torch
from excise.artifacts.events import Events
from excise.editing.hooks.token_counts import count_tokens
from excise.recipes.audit import attackers, side_by_side
from excise.recipes.audit.attack_data import Answers, reading_order
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks.table import ATTACKS, Budget
from helpers import make_pico
from unlearning_rows import FORGET, RETAIN

RATES = {"low_rank": (1e-2,), "soft_prompt": (1e-1,), "latent": (1e-1,), "all_weights": (1e-3,)}


class _Data:
    """Sequences of two sources, and a question that nobody answers."""

    questions, others, formats, seed, base, own, tokenizer = (None,), (), None, 0, None, None, None

    def ask(self, model, placeholders=0):
        return Answers([0.0])

    def hits(self, model, placeholders=0):
        return [0.0]

    def reading_order(self, source, count, seed):
        return reading_order({"T": FORGET, "retain": RETAIN}, source, count, seed)

    def mean_length(self, source):
        return 1.0


def _first_step(names, packs, monkeypatch, folder):
    """Losses and gradients of the first step of attacks, and how much was read."""
    model, seen, steps = make_pico("llama"), collections.Counter(), []
    model.set_attn_implementation("sdpa")
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))

    def losses_of(self, model, read):
        seen.clear()
        losses = mean_nats(self, model, read)
        owned = [p for place in read for p in self.adapters.owned[place]]
        gradients = torch.autograd.grad(losses.sum(), owned, retain_graph=True, allow_unused=True)
        steps.append((losses.detach(), torch.cat([g.flatten() for g in gradients if g is not None]), dict(seen)))
        return losses

    mean_nats = side_by_side.SideBySide._mean_nats
    budget = Budget(names, 1, 2, RATES, batch=4)
    with monkeypatch.context() as patch, Events().stage("attack") as stage:
        patch.setattr(side_by_side.SideBySide, "_mean_nats", losses_of)
        if not packs:
            patch.setattr(attackers, "recomputes", lambda model: True)
        AttackTraining(model, _Data(), budget, folder).curves({name: ATTACKS[name] for name in names}, stage)
    return steps[0]


@pytest.mark.parametrize(
    "names", [("rtt", "unrelated", "retain_then_forget"), ("soft_prompt",), ("latent",), ("rtt_full",)]
)
def test_a_step_in_one_row_is_the_step_of_padded_rows(names, monkeypatch, tmp_path):
    losses, gradients, seen = _first_step(names, True, monkeypatch, tmp_path)
    wanted, padded_gradients, padded = _first_step(names, False, monkeypatch, tmp_path)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)
    assert (gradients - padded_gradients).norm() < 1e-4 * padded_gradients.norm() and gradients.norm() > 1e-3
    # Each attacker reads what its sequences begin with once, and no last token, which predicts nothing.
    assert seen["padding"] == 0 < padded["padding"] and seen["tokens"] < padded["tokens"] - padded["padding"]
