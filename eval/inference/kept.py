"""The base's distributions, kept while another model is measured: whole where they fit, else the likeliest tokens.

The distributions of 64 texts over a vocabulary of 128,000 are more than 8 GB. Where they would not fit, the likeliest
tokens of each position are kept and all others count as one. The divergence of two distributions whose rest is one token
is never more than theirs (the data processing inequality), so what is reported then is a lower bound, and how much
probability the base gave to the rest is reported beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .generation import Reply, batched_log_probabilities, divergence

BYTES = 1 << 30
"""Memory that a base's distributions may take."""


@dataclass(frozen=True)
class Kept:
    """The base's distribution at each token of a reply, fp32 on the CPU."""

    log_p: Float[Tensor, "tokens kept"]
    """Of all tokens; where ``ids`` are kept, of these and of the rest, which comes last."""
    ids: Int[Tensor, "tokens kept_ids"] | None
    vocabulary: int

    @property
    def rest(self) -> Float[Tensor, " tokens"]:
        """Probability of what counts as one token, at each position."""
        return torch.zeros(len(self.log_p)) if self.ids is None else self.log_p[:, -1].exp()

    def of(self, log_q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
        """KL(kept || other) at each token, in nats, the rest of both as one token."""
        return divergence(self.log_p, log_q if self.ids is None else _lumped(log_q, self.ids))


def kept(model: Any, replies: Sequence[Reply], most: int = BYTES) -> list[Kept]:
    """The model's distributions along replies, in at most about ``most`` bytes.

    Example:
        >>> kept(model, replies)[0].log_p.shape  # doctest: +SKIP
        torch.Size([24, 49152])
    """
    tokens = sum(len(reply.ids) for reply in replies)
    results: list[Kept | None] = [None] * len(replies)
    with torch.no_grad():
        for index, log_p in batched_log_probabilities(model, replies):
            vocabulary = log_p.shape[-1]
            # A token of a few takes its id, of 8 bytes, beside its log-probability, of 4.
            few = max(1, most // (12 * max(1, tokens)))
            if few >= vocabulary - 1 or 4 * tokens * vocabulary <= most:
                results[index] = Kept(log_p, None, vocabulary)
            else:
                ids = log_p.topk(few).indices
                results[index] = Kept(_lumped(log_p, ids), ids, vocabulary)
    return [result for result in results if result is not None]


@torch.no_grad()
def divergences(model: Any, replies: Sequence[Reply], base: Sequence[Kept]) -> list[Float[Tensor, " tokens"]]:
    """KL(base || model) at each token of each reply, in nats. Nothing of the model's distributions is kept."""
    nats: list[Tensor | None] = [None] * len(replies)
    for index, log_q in batched_log_probabilities(model, replies):
        nats[index] = base[index].of(log_q)
    return [item for item in nats if item is not None]


def _lumped(log_p: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens few"]) -> Float[Tensor, "tokens few_and_1"]:
    """The log-probabilities of some tokens, and last that of all others together."""
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), others], dim=-1)
