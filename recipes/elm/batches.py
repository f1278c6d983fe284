"""Training toward soft targets: what a model reads, what it should predict there, and the loss of a batch."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...editing.architectures import layer_count, residual_width
from ...editing.modules import final_hidden, unembedding
from ...editing.training.soft_targets import SoftTargets, join, soft_divergence
from ...eval.inference.likelihood import pad_right
from ..common.adapter_run import Training
from ..common.examples import cycled, split_by_length
from ..common.tokens import Row
from ..common.trainer import Loss, Terms

TERMS = ("erase", "fluency", "retain")


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence, with targets for its last n positions."""

    ids: Row
    targets: SoftTargets
    weights: Float[Tensor, " n"]
    terms: Int[Tensor, " n"]
    """The term of the loss that each position counts in, an index of ``TERMS``."""

    @property
    def first(self) -> int:
        return len(self.ids) - len(self.targets)


def arrange(kinds: Mapping[str, Sequence[TrainingSequence]], groups: int, seed: int) -> list[list[TrainingSequence]]:
    """Groups of one sequence of each kind; each kind is gone through in a shuffled order, again and again."""
    orders = [
        cycled(sequences, groups, random.Random(f"excise lessons {kind} {seed}")) for kind, sequences in kinds.items()
    ]
    return [list(group) for group in zip(*orders, strict=True)]


ACTIVATIONS = 96 << 20
"""Bytes that the activations of one forward of a training step may take on a processor, about."""


FEWEST = 128
"""Tokens of one forward, at least."""


DEVICE_PART = 16384
"""Tokens of one forward on an accelerator, at most."""


def part_size(model: Any) -> int:
    """Tokens of one forward of a training step, at most: more at once would hold more memory and not be faster."""
    return most_tokens(model.config.to_dict(), model.dtype, model.device)


def most_tokens(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> int:
    """The same of a model that is not loaded."""
    if device.type == "cuda":
        return DEVICE_PART
    # A token leaves about 16 values of the stream's width in each layer.
    return max(FEWEST, ACTIVATIONS // (16 * dtype.itemsize * layer_count(config) * residual_width(config)))


def collate(groups: Sequence[Sequence[TrainingSequence]], most: int | None = None) -> dict[str, Any]:
    """Sequences of like length together, so that little of a batch is padding; ``parts`` are forwards of their own.

    Args:
        most: Tokens of one forward, at most.
    """
    sequences = sorted((one for group in groups for one in group), key=lambda one: len(one.ids))
    parts, start = [], 0
    for size in split_by_length([len(one.ids) for one in sequences]):
        rows = sequences[start : start + size]
        at_once = max(1, most // len(rows[-1].ids)) if most else size
        # The loss is a mean over groups, so that a batch and its parts agree on its gradient.
        parts += [_part(rows[begin : begin + at_once], 1 / len(groups)) for begin in range(0, size, at_once)]
        start += size
    return {"parts": parts}


def _part(sequences: Sequence[TrainingSequence], weight: float) -> dict[str, Tensor]:
    """Rows of one forward; ``rows`` and ``places`` say which positions have targets."""
    targets = join([one.targets for one in sequences])
    counts = torch.tensor([len(one.targets) for one in sequences])
    return {
        **pad_right([one.ids for one in sequences], torch.device("cpu")),
        "rows": torch.repeat_interleave(torch.arange(len(sequences)), counts),
        "places": torch.cat([torch.arange(one.first, len(one.ids)) for one in sequences]),
        "terms": torch.cat([one.terms for one in sequences]),
        "weights": weight * torch.cat([one.weights for one in sequences]),
        "target_ids": targets.ids,
        "log_p": targets.log_p,
        "rest": targets.rest,
    }


def sequence_loss(weights: Mapping[str, float]) -> Loss:
    """The weighted divergence from the targets, in nats, split into its terms.

    Of several parts, each is differentiated before the next is read, so that the activations of one are held at a time.
    """

    def loss(model: nn.Module, batch: dict[str, Any]) -> Terms:
        if len(batch["parts"]) == 1:
            return _part_terms(model, batch["parts"][0], weights)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Where the terms are; what is trained may lie on other GPUs.
        device = batch["parts"][0]["input_ids"].device
        sums = {term: torch.zeros((), device=device) for term in TERMS}
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        for part in batch["parts"]:
            terms = _part_terms(model, part, weights)
            of_part = torch.autograd.grad(torch.stack(list(terms.values())).sum(), trained, allow_unused=True)
            for total, gradient in zip(gradients, of_part, strict=True):
                if gradient is not None:
                    total += gradient
            sums = {term: sums[term] + value.detach() for term, value in terms.items()}
        # Nothing in value, with the parts' gradients: the trainer goes backward through it as through any loss.
        levers = [(p * gradient).sum().to(device) for p, gradient in zip(trained, gradients, strict=True)]
        lever = torch.stack(levers).sum()
        return {**sums, TERMS[0]: sums[TERMS[0]] + (lever - lever.detach())}

    return loss


class SequenceTraining(Training):
    """Groups of sequences, trained toward soft targets in forwards of as many tokens as fit."""

    tokens_at_once: int
    """Tokens of one forward, at most."""
    weighted_loss: Loss

    def collate(self, rows: list[Sequence[TrainingSequence]]) -> dict[str, Any]:
        """Parts of like length, each a forward of its own."""
        return collate(rows, self.tokens_at_once)

    def less(self) -> bool:
        """Half as many tokens in a forward."""
        if self.tokens_at_once <= FEWEST_TOKENS:
            return False
        self.tokens_at_once //= 2
        return True

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """The divergence from the targets; of ELM this is equation 10."""
        return self.weighted_loss(model, batch)


TARGET_BYTES = 12
"""Of one stored token of a target: its id and its log-probability."""
FEWEST_TOKENS = 8
"""Tokens of a forward below which a row alone is read in any case."""


def _part_terms(model: nn.Module, part: Mapping[str, Tensor], weights: Mapping[str, float]) -> Terms:
    hidden = final_hidden(model, {key: part[key] for key in ("input_ids", "attention_mask")})
    targets = SoftTargets(part["target_ids"], part["log_p"], part["rest"])
    weighted = soft_divergence(hidden[part["rows"], part["places"]], unembedding(model), targets) * part["weights"]
    sums = weighted.new_zeros(len(TERMS)).index_add(0, part["terms"], weighted)
    return {term: sums[index] * weights[term] for index, term in enumerate(TERMS)}
