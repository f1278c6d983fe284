"""Target distributions for training: stored sparsely, combined as in ELM, and compared exactly.

A distribution over the vocabulary is stored as its largest entries and one more outcome, "any other token". Divergences
are exact on that partition. They are never above the divergence over the whole vocabulary, and equal to it if both
distributions divide the rest alike or the rest is empty.

Example:
    >>> streams = keep_streams(bare, expert, novice, 64)  # log-probabilities [n, vocab] of a frozen model
    >>> targets = streams.target(strength=1.5)
    >>> loss = soft_divergence(hidden, unembedding(model), targets).mean()  # hidden [n, d]

Source: ELM (Gandikota et al. 2024, "Erasing Conceptual Knowledge from Language Models"), equations 5 and 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..modules import Head
from ..numerics.wide import wide

LOGITS_BUDGET = 32 << 20
"""Bytes that the tensors of one chunk of fp32 logits may take on a CPU; more would not be faster."""
DEVICE_LOGITS_BUDGET = 512 << 20
"""The same on a GPU."""
FEWEST = 32
"""Least positions in a chunk; with fewer, reading the unembedding matrix would dominate the time."""


def positions_at_once(vocabulary: int, device: torch.device, budget: int | None = None) -> int:
    """Number of positions whose logits are computed together."""
    # Three fp32 tensors of the logits' shape exist at once: 12 bytes per entry.
    bytes_held = budget or (DEVICE_LOGITS_BUDGET if device.type == "cuda" else LOGITS_BUDGET)
    return max(FEWEST if budget is None else 1, bytes_held // (12 * vocabulary))


@dataclass(frozen=True)
class SoftTargets:
    """A sparse distribution for each of n positions."""

    ids: Int[Tensor, "n k"]
    log_p: Float[Tensor, "n k"]
    """Natural log-probabilities of ``ids``; together with ``rest`` the probabilities sum to 1."""
    rest: Float[Tensor, " n"]
    """Log-probability of all other tokens together; ``-inf`` if ``ids`` is the whole vocabulary."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | Tensor) -> "SoftTargets":
        return SoftTargets(self.ids[positions], self.log_p[positions], self.rest[positions])

    def largest(self, count: int) -> "SoftTargets":
        """Only the ``count`` likeliest tokens of each position, normalized; all others get probability 0."""
        return SoftTargets(self.ids, cut_to(self.log_p, count), torch.full_like(self.rest, -torch.inf))


@dataclass(frozen=True)
class Streams:
    """Predictions of the frozen model at n positions in three contexts, over the same k tokens and "any other token".

    They are enough to compute the target of any strength without another forward.
    """

    ids: Int[Tensor, "n k"]
    bare: Float[Tensor, "n k1"]
    """Log-probabilities without a prefix; the last column is "any other token"."""
    expert: Float[Tensor, "n k1"]
    """The same after a prefix by someone who knows the concept."""
    novice: Float[Tensor, "n k1"]
    """The same after a prefix by someone who does not."""

    def target(self, strength: float | Float[Tensor, " n"], *, one_sided: bool = False) -> SoftTargets:
        """``log p0 + strength (log p_novice - log p_expert)``, normalized (ELM, equations 5 and 6).

        "Any other token" counts as one token.

        Args:
            strength: The paper's eta, one number or one per position.
            one_sided: Above strength 1, only lower the tokens that the expert prefers, and leave the others at
                strength 1. Tokens that the expert almost excludes differ by noise alone, and a two-sided contrast
                above 1 would turn that noise into the target's largest entries.
        """
        log_p = mixed(self.bare, self.expert, self.novice, strength, one_sided=one_sided)
        return SoftTargets(self.ids, log_p[:, :-1], log_p[:, -1])

    def disagreement(self) -> Float[Tensor, " n"]:
        """Total variation distance between expert and novice, 0 to 1."""
        return total_variation(self.expert, self.novice)

    def left_over(self) -> Float[Tensor, " n"]:
        """Probability that the frozen model gives to all tokens that are not stored, 0 to 1."""
        return self.bare[:, -1].exp()


def mixed(
    bare: Float[Tensor, "n v"],
    expert: Float[Tensor, "n v"],
    novice: Float[Tensor, "n v"],
    strength: float | Float[Tensor, " n"],
    *,
    one_sided: bool = False,
) -> Float[Tensor, "n v"]:
    """``log p0 + strength (log p_novice - log p_expert)``, normalized; see ``Streams.target``."""
    factor = strength[:, None] if isinstance(strength, Tensor) else torch.tensor(strength)
    difference = novice - expert
    if one_sided:
        log_p = bare + factor.clamp_max(1.0) * difference + (factor - 1).clamp_min(0) * difference.clamp_max(0)
    else:
        log_p = bare + factor * difference
    # What nothing predicts, such as the rest beside a whole vocabulary, is -inf in all three, and -inf - -inf is NaN.
    return torch.where(bare.isneginf(), bare, log_p).log_softmax(-1)


def cut_to(log_p: Float[Tensor, "n v"], count: int) -> Float[Tensor, "n v"]:
    """The ``count`` likeliest entries of each row, normalized, and all that tie with the last of them; -inf elsewhere."""
    least = log_p.topk(min(count, log_p.shape[-1]), -1).values[:, -1:]
    return log_p.masked_fill(log_p < least, -torch.inf).log_softmax(-1)


def total_variation(one: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Total variation distance of distributions given as log-probabilities, 0 to 1."""
    return (one.exp() - other.exp()).abs().sum(-1) / 2


def certain(tokens: Int[Tensor, " n"], count: int, vocabulary: int) -> SoftTargets:
    """Targets that give each position's token probability 1, stored beside ``count - 1`` others of probability 0."""
    ids = (tokens[:, None] + torch.arange(min(count, vocabulary), device=tokens.device)) % vocabulary
    log_p = torch.full(ids.shape, -torch.inf, device=tokens.device)
    log_p[:, 0] = 0.0
    return SoftTargets(ids, log_p, torch.full((len(ids),), -torch.inf, device=tokens.device))


def keep_streams(
    bare: Float[Tensor, "n v"], expert: Float[Tensor, "n v"], novice: Float[Tensor, "n v"], count: int
) -> Streams:
    """Store the tokens that are likely in any of the three distributions, or in a strong contrast of them.

    Args:
        bare: Log-probabilities without a prefix.
        expert: Log-probabilities after the expert's prefix.
        novice: Log-probabilities after the novice's prefix.
        count: Tokens stored per position, at most.
    """
    vocabulary = bare.shape[-1]
    if count >= vocabulary:
        # All tokens in their order, so that a token's place is its id.
        ids = torch.arange(vocabulary, device=bare.device).expand(len(bare), -1)
        no_rest = torch.full_like(bare[:, :1], -torch.inf)
        return Streams(ids, *(torch.cat([stream, no_rest], -1) for stream in (bare, expert, novice)))
    contrast = torch.add(bare, novice - expert, alpha=STRONG).log_softmax(-1)
    scores = torch.maximum(torch.maximum(bare, expert), torch.maximum(novice, contrast))
    ids = scores.topk(count, -1).indices
    return Streams(ids, *(_with_rest(stream, ids) for stream in (bare, expert, novice)))


STRONG = 5.0
"""Strength of that contrast: tokens that such a target prefers are stored too."""


def keep_top(log_p: Float[Tensor, "n v"], count: int) -> SoftTargets:
    """The ``count`` largest entries of each distribution of log-probabilities, and the rest as one entry."""
    ids = log_p.topk(min(count, log_p.shape[-1]), -1).indices
    whole = _with_rest(log_p, ids)
    return SoftTargets(ids, whole[:, :-1], whole[:, -1])


def soft_divergence(
    hidden: Float[Tensor, "n d"], head: Head, targets: SoftTargets, budget: int | None = None
) -> Float[Tensor, " n"]:
    """KL(target || model) at each position, in nats, differentiable in the hidden states.

    Logits exist for one chunk of positions at a time, because forward and backward of the unembedding run together.
    The head gets no gradient.

    Args:
        hidden: Final hidden states of the model in training.
        head: Its unembedding (``excise.editing.modules.unembedding``).
        targets: Target distributions of the same n positions.
        budget: Bytes of one chunk; by default what suits the device.
    """
    divergence: Float[Tensor, " n"] = _Chunked.apply(hidden, head, targets, budget)
    return divergence


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Head, targets: SoftTargets, budget: int | None) -> Tensor:
        divergence = torch.empty(
            len(hidden), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        gradient = torch.empty_like(hidden)
        wanted = context.needs_input_grad[0]
        # The vocabulary's size, which decides how many positions fit, is known only after a first small chunk.
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
    """KL divergence of each position in nats, and its gradient with respect to the logits."""
    logits, p = wide(logits), targets.log_p.exp()
    if targets.ids.shape[-1] == logits.shape[-1]:
        log_q = logits.log_softmax(-1).gather(-1, targets.ids)
        gradient = torch.empty_like(logits)
        # The gradient of KL(p || q) with respect to the logits of q is q - p.
        gradient.scatter_(-1, targets.ids, log_q.exp() - p)
        return _weighted(p, targets.log_p - log_q), gradient
    # The target says nothing of how the other tokens share the rest, so their gradient keeps the model's proportions.
    stored = logits.gather(-1, targets.ids)
    others = logits.scatter(-1, targets.ids, -torch.inf)
    gradient = others.softmax(-1)
    # logsumexp of the other tokens, from their softmax: the largest has the probability exp(max - logsumexp). This
    # saves a pass over the vocabulary.
    of_others = others.amax(-1, keepdim=True) - gradient.amax(-1, keepdim=True).log()
    whole = torch.logaddexp(stored.logsumexp(-1, keepdim=True), of_others)
    log_q, q_rest = stored - whole, (of_others - whole)[:, 0]
    p_rest = targets.rest.exp()
    divergence = _weighted(p, targets.log_p - log_q) + torch.where(p_rest > 0, p_rest * (targets.rest - q_rest), 0.0)
    gradient *= (q_rest.exp() - p_rest)[:, None]
    return divergence, gradient.scatter_(-1, targets.ids, log_q.exp() - p)


def _weighted(p: Tensor, difference: Tensor) -> Tensor:
    # Where p is 0 the difference may be infinite, and 0 times infinity is NaN.
    return torch.where(p > 0, p * difference, 0.0).sum(-1)


def _with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)


def join(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Targets of several sequences, concatenated; all must store the same number of tokens per position."""
    return SoftTargets(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.rest for part in parts]),
    )
