"""Distributions that a model is trained toward: kept sparse, combined as ELM does, compared exactly.

A distribution over the vocabulary is kept as its largest entries and one more outcome, "any other
token". Divergences are exact on that partition: never above the divergence over the whole vocabulary,
and equal to it where the two distributions agree on how the rest divides, or nothing is left over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..modules import Head

LOGITS_BUDGET = 32 << 20
"""Bytes that the tensors of one chunk of fp32 logits may take on a processor: more would not be faster."""


DEVICE_LOGITS_BUDGET = 512 << 20
"""The same on an accelerator."""


FEWEST = 32
"""Positions of a chunk, at least: for fewer, reading the unembedding would be most of the work."""


def positions_at_once(vocabulary: int, device: torch.device, budget: int | None = None) -> int:
    """Positions whose logits are formed together; three fp32 tensors of their shape are alive at once."""
    bytes_held = budget or (DEVICE_LOGITS_BUDGET if device.type == "cuda" else LOGITS_BUDGET)
    return max(FEWEST if budget is None else 1, bytes_held // (12 * vocabulary))


@dataclass(frozen=True)
class SoftTargets:
    """A sparse distribution for each of n positions."""

    ids: Int[Tensor, "n k"]
    log_p: Float[Tensor, "n k"]
    """Natural logarithms; with ``rest`` they sum to 1."""
    rest: Float[Tensor, " n"]
    """Log-mass of all other tokens; ``-inf`` where every token of the vocabulary is kept."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | Tensor) -> "SoftTargets":
        return SoftTargets(self.ids[positions], self.log_p[positions], self.rest[positions])

    def largest(self, count: int) -> "SoftTargets":
        """Only the ``count`` likeliest tokens of each position, normalized; all others become impossible."""
        least = self.log_p.topk(min(count, self.log_p.shape[-1]), -1).values[:, -1:]
        cut = self.log_p.masked_fill(self.log_p < least, -torch.inf).log_softmax(-1)
        return SoftTargets(self.ids, cut, torch.full_like(self.rest, -torch.inf))


@dataclass(frozen=True)
class Streams:
    """What the frozen model predicts at n positions in three contexts, over the same kept tokens.

    Enough to form the target of any strength without another forward.
    """

    ids: Int[Tensor, "n k"]
    bare: Float[Tensor, "n k1"]
    """Log-probabilities without a prefix; the last column holds the rest."""
    expert: Float[Tensor, "n k1"]
    novice: Float[Tensor, "n k1"]

    def target(self, strength: float | Float[Tensor, " n"], *, one_sided: bool = False) -> SoftTargets:
        """``log p0 + strength (log p_novice - log p_expert)``, normalized (ELM, equations 5 and 6).

        The rest counts as one token. The strength (eta) may differ between positions.

        Args:
            one_sided: Beyond strength 1, push further down what the expert prefers and leave the rest as the novice
                has it. Tokens that the expert all but excludes differ by noise alone, which a two-sided contrast
                of more than 1 would turn into the target's largest entries.
        """
        factor = strength[:, None] if isinstance(strength, Tensor) else torch.tensor(strength)
        difference = self.novice - self.expert
        if one_sided:
            mixed = self.bare + factor.clamp_max(1.0) * difference + (factor - 1).clamp_min(0) * difference.clamp_max(0)
        else:
            mixed = self.bare + factor * difference
        # Where nothing is left over, the rest is impossible in all three and stays so.
        mixed = torch.where(self.bare.isneginf(), self.bare, mixed).log_softmax(-1)
        return SoftTargets(self.ids, mixed[:, :-1], mixed[:, -1])

    def disagreement(self) -> Float[Tensor, " n"]:
        """Total variation between expert and novice, 0 to 1."""
        return (self.expert.exp() - self.novice.exp()).abs().sum(-1) / 2

    def left_over(self) -> Float[Tensor, " n"]:
        """Probability that the frozen model gives to tokens that are not kept."""
        return self.bare[:, -1].exp()


def keep_streams(
    bare: Float[Tensor, "n v"], expert: Float[Tensor, "n v"], novice: Float[Tensor, "n v"], kept: int
) -> Streams:
    """Keep the tokens that matter in any of the three distributions, or in a strong mixture of them.

    Args:
        bare: Log-probabilities, as are the other two.
        kept: Tokens a position, at most.
    """
    vocabulary = bare.shape[-1]
    if kept >= vocabulary:
        ids = torch.arange(vocabulary, device=bare.device).expand(len(bare), -1)
        sealed = torch.full_like(bare[:, :1], -torch.inf)
        return Streams(ids, *(torch.cat([stream, sealed], -1) for stream in (bare, expert, novice)))
    contrast = torch.add(bare, novice - expert, alpha=STRONG).log_softmax(-1)
    scores = torch.maximum(torch.maximum(bare, expert), torch.maximum(novice, contrast))
    ids = scores.topk(kept, -1).indices
    return Streams(ids, *(_with_rest(stream, ids) for stream in (bare, expert, novice)))


STRONG = 5.0
"""Strength whose favourite tokens are always kept."""


def keep_top(log_p: Float[Tensor, "n v"], kept: int) -> SoftTargets:
    """The largest entries of each distribution."""
    kept = min(kept, log_p.shape[-1])
    ids = log_p.topk(kept, -1).indices
    whole = _with_rest(log_p, ids)
    return SoftTargets(ids, whole[:, :-1], whole[:, -1])


def soft_divergence(
    hidden: Float[Tensor, "n d"], head: Head, targets: SoftTargets, budget: int | None = None
) -> Float[Tensor, " n"]:
    """KL(target || model) at each position, in nats, with its gradient for the hidden states.

    Logits exist for one chunk of positions at a time: forward and backward of the unembedding happen
    together, so neither logits nor probabilities of all positions are ever held. The head gets no gradient.
    """
    divergence: Float[Tensor, " n"] = _Chunked.apply(hidden, head, targets, budget)
    return divergence


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Head, targets: SoftTargets, budget: int | None) -> Tensor:
        divergence = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden)
        wanted = context.needs_input_grad[0]
        start, size = 0, 16
        while start < len(hidden):
            rows = slice(start, start + size)
            part = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(part)
            divergence[rows], of_logits = _compare(logits.detach(), targets[rows])
            if wanted:
                (gradient[rows],) = torch.autograd.grad(logits, part, of_logits.to(logits.dtype))
            start += size
            size = positions_at_once(logits.shape[-1], hidden.device, budget)
        context.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


def _compare(logits: Tensor, targets: SoftTargets) -> tuple[Tensor, Tensor]:
    """Divergence of each position, and its gradient for the logits."""
    logits, p = logits.float(), targets.log_p.exp()
    if targets.ids.shape[-1] == logits.shape[-1]:
        own = logits.log_softmax(-1).gather(-1, targets.ids)
        gradient = torch.empty_like(logits)
        gradient.scatter_(-1, targets.ids, own.exp() - p)
        return _weighted(p, targets.log_p - own), gradient
    # Kept tokens and all others apart: the others' distribution among themselves scales with the rest alone.
    kept = logits.gather(-1, targets.ids)
    others = logits.scatter(-1, targets.ids, -torch.inf)
    gradient = others.softmax(-1)
    of_others = others.amax(-1, keepdim=True) - gradient.amax(-1, keepdim=True).log()
    whole = torch.logaddexp(kept.logsumexp(-1, keepdim=True), of_others)
    own, q_rest = kept - whole, (of_others - whole)[:, 0]
    p_rest = targets.rest.exp()
    divergence = _weighted(p, targets.log_p - own) + torch.where(p_rest > 0, p_rest * (targets.rest - q_rest), 0.0)
    gradient *= (q_rest.exp() - p_rest)[:, None]
    return divergence, gradient.scatter_(-1, targets.ids, own.exp() - p)


def _weighted(p: Tensor, difference: Tensor) -> Tensor:
    """Where p is 0 a difference may be infinite."""
    return torch.where(p > 0, p * difference, 0.0).sum(-1)


def _with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)


def join(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Targets of several sequences, one after another; all keep the same number of tokens."""
    return SoftTargets(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.rest for part in parts]),
    )
