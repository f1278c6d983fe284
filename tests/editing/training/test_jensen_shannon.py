"""Jensen-Shannon divergences against their definition over the whole vocabulary, in float64."""

import math

import pytest
import torch
from excise.editing.training.jensen_shannon import between_hidden, from_certain


def _by_definition(p, q):
    total = 0.0
    for one, other in ((p, q), (q, p)):
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            total += a * math.log(2 * a / (a + b)) / 2 if a > 0 else 0.0
    return total


def test_from_a_certain_token_it_needs_that_tokens_probability_alone():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    log_p = logits.log_softmax(-1)
    found = from_certain(log_p[:, 3])
    certain = torch.eye(11, dtype=torch.float64)[3]
    assert found.tolist() == pytest.approx([_by_definition(row.exp(), certain) for row in log_p], rel=1e-9)
    ends = from_certain(torch.tensor([0.0, -60.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-12)
    far = torch.tensor([-40.0], requires_grad=True)
    from_certain(far).backward()
    assert float(far.grad.abs()) < 1e-12, "what is out of reach pulls at nothing: the loss is bounded"


@pytest.mark.parametrize("budget", [None, 1])
def test_between_two_models_it_is_the_definition_and_so_is_its_gradient(budget):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(5, 17, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden, other = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_(True)
    found = between_hidden(hidden, other, head, budget)
    rows = [(head(one).softmax(-1), head(two).softmax(-1)) for one, two in zip(hidden, other, strict=True)]
    assert found.tolist() == pytest.approx([_by_definition(p.detach(), q) for p, q in rows], rel=1e-9)
    assert float(found.min()) > 0 and float(found.max()) <= math.log(2)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    step = 1e-6
    for place in ((0, 0), (3, 2), (6, 4)):
        moved = hidden.detach().clone()
        moved[place] += step
        slope = ((between_hidden(moved, other, head) - found) * weights).sum() / step
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-3, abs=1e-7)
    assert torch.allclose(between_hidden(other, other, head), torch.zeros(7, dtype=torch.float64), atol=1e-12)
