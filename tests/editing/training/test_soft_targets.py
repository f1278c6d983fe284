"""Targets that ELM trains toward, and the divergence from them."""

from itertools import pairwise

import pytest
import torch
from excise.editing.modules import final_hidden, unembedding
from excise.editing.training.soft_targets import Streams, keep_streams, keep_top, soft_divergence
from helpers import make_pico

V, N, D = 50, 12, 16


def _log_p(seed, sharpness=2.0):
    return (sharpness * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def _head(seed=9):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    return lambda hidden: hidden @ weight.T


def _hidden():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3)).requires_grad_()


def test_at_strength_0_the_target_is_the_frozen_model():
    streams = keep_streams(_log_p(0), _log_p(1), _log_p(2), V)
    assert torch.allclose(streams.target(0.0).log_p, _log_p(0), atol=1e-6)
    assert not torch.allclose(streams.target(1.0).log_p, _log_p(0), atol=0.1)


def test_where_expert_and_novice_agree_nothing_is_erased():
    streams = keep_streams(_log_p(0), _log_p(1), _log_p(1), V)
    assert torch.allclose(streams.target(500.0).log_p, _log_p(0), atol=1e-4)
    assert streams.disagreement().max() < 1e-6
    assert keep_streams(_log_p(0), _log_p(1), _log_p(2), V).disagreement().min() > 0.1


def test_the_target_is_the_published_product():
    bare, expert, novice = _log_p(0), _log_p(1), _log_p(2)
    wanted = (bare + 1.5 * (novice - expert)).log_softmax(-1)
    assert torch.allclose(keep_streams(bare, expert, novice, V).target(1.5).log_p, wanted, atol=1e-5)


def test_divergence_from_the_frozen_model_grows_with_strength():
    streams = keep_streams(_log_p(0), _log_p(1), _log_p(2), V)
    own = _log_p(0)
    nats = [float((own.exp() * (own - streams.target(s).log_p)).sum(-1).mean()) for s in (0.0, 0.5, 1.0, 2.0, 5.0)]
    assert nats == sorted(nats) and nats[0] < 1e-6 < nats[1]


def test_strength_may_differ_between_positions():
    streams = keep_streams(_log_p(0), _log_p(1), _log_p(2), V)
    ramp = streams.target(torch.linspace(0.0, 2.0, N)).log_p
    assert torch.allclose(ramp[0], streams.target(0.0).log_p[0], atol=1e-6)
    assert torch.allclose(ramp[-1], streams.target(2.0).log_p[-1], atol=1e-6)


def test_one_sided_it_is_the_published_target_up_to_1_and_lifts_nothing_beyond():
    bare, expert, novice = _log_p(0), _log_p(0), _log_p(2)
    streams = keep_streams(bare, expert, novice, V)
    for strength in (0.0, 0.4, 1.0):
        assert torch.allclose(streams.target(strength, one_sided=True).log_p, streams.target(strength).log_p, atol=1e-5)
    disliked = expert < novice
    strong = streams.target(4.0, one_sided=True).log_p
    # Among what the expert likes less than the novice does, proportions are the novice's own.
    for row in range(N):
        shift = (strong - novice)[row][disliked[row]]
        assert (shift - shift[0]).abs().max() < 1e-4
        assert (strong - novice)[row][~disliked[row]].max() < shift[0] + 1e-4
    two_sided = (streams.target(4.0).log_p - novice)[0][disliked[0]]
    assert (two_sided - two_sided[0]).abs().max() > 1


def test_kept_tokens_and_rest_sum_to_one():
    for kept in (3, 10, V):
        target = keep_streams(_log_p(0), _log_p(1), _log_p(2), kept).target(1.3)
        total = torch.cat([target.log_p, target.rest[:, None]], -1).logsumexp(-1)
        assert torch.allclose(total, torch.zeros(N), atol=1e-5)
    assert keep_streams(_log_p(0), _log_p(1), _log_p(2), V).left_over().max() == 0
    assert keep_streams(_log_p(0), _log_p(1), _log_p(2), 3).left_over().min() > 0


def test_the_largest_tokens_alone_are_a_distribution():
    cut = keep_top(_log_p(0), V).largest(5)
    assert torch.allclose(cut.log_p.exp().sum(-1), torch.ones(N), atol=1e-5)
    assert ((cut.log_p > -torch.inf).sum(-1) == 5).all() and cut.rest.isneginf().all()


def test_the_divergence_is_exact_where_every_token_is_kept():
    hidden, target = _hidden(), _log_p(5)
    found = soft_divergence(hidden, _head(), keep_top(target, V))
    own = _head()(hidden).log_softmax(-1)
    wanted = (target.exp() * (target - own)).sum(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(value.sum(), hidden)[0] for value in (found, wanted)), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 12 * V * 5, 1 << 30])
def test_chunks_change_neither_value_nor_gradient(budget):
    hidden, targets = _hidden(), keep_top(_log_p(5), 7)
    one, many = (soft_divergence(hidden, _head(), targets, size) for size in (1 << 30, budget))
    weights = torch.linspace(0.1, 2, N)
    assert torch.allclose(one, many, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad((d * weights).sum(), hidden)[0] for d in (one, many)), atol=1e-6)


def test_with_a_rest_the_gradient_is_that_of_the_coarser_divergence():
    hidden, target = _hidden(), keep_top(_log_p(5), 7)
    found = soft_divergence(hidden, _head(), target)
    own = _head()(hidden).softmax(-1)
    kept = own.gather(-1, target.ids)
    rest = (1 - kept.sum(-1)).clamp_min(1e-12)
    wanted = (target.log_p.exp() * (target.log_p - kept.log())).sum(-1) + target.rest.exp() * (target.rest - rest.log())
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(*(torch.autograd.grad(value.sum(), hidden)[0] for value in (found, wanted)), atol=1e-4)


def test_keeping_fewer_tokens_never_overstates_the_divergence():
    hidden = _hidden().detach()
    nats = [soft_divergence(hidden, _head(), keep_top(_log_p(5), kept)) for kept in (2, 5, 20, V)]
    for fewer, more in pairwise(nats):
        assert (fewer <= more + 1e-5).all()
    assert (nats[0] < nats[-1] - 0.01).any()


def test_impossible_targets_give_finite_gradients():
    hidden = _hidden()
    soft_divergence(hidden, _head(), keep_top(_log_p(5), V).largest(1)).sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() > 0


def test_hidden_states_and_unembedding_give_the_models_own_logits(architecture):
    model = make_pico(architecture)
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        logits = unembedding(model)(final_hidden(model, inputs))
        assert torch.allclose(logits, model(**inputs).logits, atol=1e-5)


def test_streams_of_full_distributions_know_no_rest():
    streams = Streams(
        torch.arange(V).expand(N, -1), *(torch.cat([_log_p(i), torch.full((N, 1), -torch.inf)], -1) for i in range(3))
    )
    target = streams.target(50.0)
    assert target.rest.isneginf().all() and target.log_p.isfinite().all()
