"""Jensen-Shannon divergence, which is symmetric and at most log 2: as a loss it never runs away.

Source: JensUn (Singh et al. 2025, arXiv 2509.02820), section 3.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modules import Head
from ..numerics.wide import wide
from .soft_targets import positions_at_once


def from_certain(log_p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """JSD of a distribution and a certain token, from the log-probability of that token; in nats.

    With m the mean of both, every other token adds ``p log 2`` and the token itself the rest:
    ``1/2 (2 log 2 + p log p - (1 + p) log(1 + p))``.

    Example:
        >>> from_certain(torch.tensor([0.0]))
        tensor([0.])
    """
    p = log_p.exp()
    return (2 * math.log(2) + p * log_p - (1 + p) * torch.log1p(p)) / 2


def between_hidden(
    hidden: Float[Tensor, "n d"], other: Float[Tensor, "n d"], head: Head, budget: int | None = None
) -> Float[Tensor, " n"]:
    """JSD of what two models predict that share an unembedding, at each position, in nats.

    Logits exist for one chunk of positions at a time and are computed again in the backward pass.

    Args:
        hidden: Final hidden states of the model in training.
        other: Those of the model that it is compared with; they get no gradient.
        head: The unembedding of both.
        budget: Bytes of one chunk; by default what suits the device.
    """
    size = positions_at_once(head(hidden[:1].detach()).shape[-1], hidden.device, budget)
    parts = []
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        parts.append(
            checkpoint(
                _between, hidden[rows], other[rows].detach(), head, use_reentrant=False, preserve_rng_state=False
            )
        )
    return torch.cat(parts)


def _between(hidden: Tensor, other: Tensor, head: Head) -> Tensor:
    log_p, log_q = (wide(head(states)).log_softmax(-1) for states in (hidden, other))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
