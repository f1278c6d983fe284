"""Entropy of what a model predicts, from its final hidden states."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modules import Head
from ..numerics.wide import wide
from .soft_targets import positions_at_once


def entropy_of_hidden(hidden: Float[Tensor, "n d"], head: Head, budget: int | None = None) -> Float[Tensor, " n"]:
    """Entropy of the distribution over the vocabulary at each position, in nats.

    Logits exist for one chunk of positions at a time and are computed again in the backward pass.

    Args:
        hidden: Final hidden states.
        head: The unembedding.
        budget: Bytes of one chunk; by default what suits the device.

    Example:
        >>> entropy_of_hidden(torch.zeros(1, 4), lambda hidden: hidden)
        tensor([1.3863])
    """
    size = positions_at_once(head(hidden[:1].detach()).shape[-1], hidden.device, budget)
    chunks = [hidden[start : start + size] for start in range(0, len(hidden), size)]
    parts = [checkpoint(_entropy, chunk, head, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(parts)


def _entropy(hidden: Tensor, head: Head) -> Tensor:
    log_p = wide(head(hidden)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
