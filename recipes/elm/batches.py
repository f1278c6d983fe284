"""Training toward soft targets: what a model reads, what it should predict there, and the loss of a batch."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...editing.modules import final_hidden, unembedding
from ...editing.training.packing import packed, read_packed
from ...editing.training.soft_targets import SoftTargets, join, soft_divergence
from ...eval.inference.likelihood import pad_right
from ..common.adapter_run import Training
from ..common.examples import cycled, split_by_length
from ..common.memory_sizes import Rows
from ..common.packed_training import PackedObjective
from ..common.tokens import Row
from ..common.trainer import Loss, Terms

TERMS = ("erase", "fluency", "retain")
T = TypeVar("T")


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


def arrange(
    kinds: Mapping[str, Sequence[TrainingSequence]], groups: int, seed: int, *, in_turn: bool = False
) -> list[list[TrainingSequence]]:
    """Groups of one sequence of each kind; each kind is gone through in a shuffled order, again and again.

    Args:
        in_turn: A group has the first kind and one of the others, each in its turn.
    """
    orders = [
        cycled(sequences, groups, random.Random(f"excise lessons {kind} {seed}")) for kind, sequences in kinds.items()
    ]
    return _grouped(orders, in_turn=in_turn)


def _grouped(orders: Sequence[Sequence[T]], *, in_turn: bool) -> list[list[T]]:
    """Groups of what each kind has in its order."""
    if not in_turn or len(orders) < 2:
        return [list(group) for group in zip(*orders, strict=True)]
    first, *others = orders
    return [[one, others[turn % len(others)][turn // len(others)]] for turn, one in enumerate(first)]


def largest_part(
    kinds: Sequence[Sequence[int]], steps: int, batch_size: int, most: int, seed: int, *, in_turn: bool = False
) -> Rows:
    """What the largest forward of a training reads, about: sequences of these lengths, drawn as ``arrange`` draws them.

    Args:
        kinds: Tokens of each sequence, by kind.
        most: Tokens of one forward, at most.
    """
    # More than will be read, because it is drawn in another order than here.
    rng, groups = random.Random(f"excise plan {seed}"), min(4 * steps + 20, PLANNED_STEPS) * batch_size
    drawn = [cycled(lengths, groups, rng) for lengths in kinds if lengths]
    tokens = [sum(group) for group in _grouped(drawn, in_turn=in_turn)]
    largest = max(sum(tokens[start : start + batch_size]) for start in range(0, groups, batch_size))
    count = -(-min(most, largest) // max(map(max, drawn)))
    return Rows(count, -(-min(most, largest) // count))


PLANNED_STEPS = 1000
"""Steps that a plan draws, at most: the largest of so many is about the largest of all."""
PROCESSOR_PART, DEVICE_PART = 2048, 16384
"""Tokens of one forward of a training step, at most, on a processor and on an accelerator: more at once would not be
faster. Where memory has room for fewer, ``tokens_at_once`` says how many."""


def part_size(device: torch.device) -> int:
    """Tokens of one forward of a training step, at most."""
    return DEVICE_PART if device.type == "cuda" else PROCESSOR_PART


def collate(
    groups: Sequence[Sequence[TrainingSequence]], most: int | None = None, *, in_one_row: bool = False
) -> dict[str, Any]:
    """The sequences of a step in ``parts``, each a forward of its own.

    Args:
        most: Tokens of one forward, at most, but for a single sequence that is longer.
        in_one_row: Pack the sequences of a part into one row, which a model that ``packing`` made ready reads; otherwise
            sequences of like length stand below each other, so that little of a part is padding.
    """
    sequences = sorted((one for group in groups for one in group), key=lambda one: len(one.ids))
    divided = _by_tokens(sequences, most) if in_one_row else _by_length(sequences, most)
    # The loss is a mean over groups, so that a batch and its parts agree on its gradient.
    return {"parts": [_part(some, 1 / len(groups), in_one_row=in_one_row) for some in divided]}


def _by_length(sequences: Sequence[TrainingSequence], most: int | None) -> Iterator[Sequence[TrainingSequence]]:
    start = 0
    for size in split_by_length([len(one.ids) for one in sequences]):
        rows = sequences[start : start + size]
        at_once = max(1, most // len(rows[-1].ids)) if most else size
        yield from (rows[begin : begin + at_once] for begin in range(0, size, at_once))
        start += size


def _by_tokens(sequences: Sequence[TrainingSequence], most: int | None) -> Iterator[Sequence[TrainingSequence]]:
    """Parts of about as many tokens each, in as few as there can be."""
    total = sum(len(one.ids) for one in sequences)
    share = -(-total // -(-total // most)) if most else total
    part: list[TrainingSequence] = []
    tokens = 0
    for one in sequences:
        if part and (tokens >= share or (most is not None and tokens + len(one.ids) > most)):
            yield part
            part, tokens = [], 0
        part.append(one)
        tokens += len(one.ids)
    yield part


def _part(sequences: Sequence[TrainingSequence], weight: float, *, in_one_row: bool) -> dict[str, Any]:
    """What one forward reads; ``rows`` and ``places`` say which positions have targets."""
    targets = join([one.targets for one in sequences])
    counts = torch.tensor([len(one.targets) for one in sequences])
    rows = torch.repeat_interleave(torch.arange(len(sequences)), counts, output_size=len(targets))
    places = torch.cat([torch.arange(one.first, len(one.ids)) for one in sequences])
    ids = [one.ids for one in sequences]
    inputs = packed(ids) if in_one_row else pad_right(ids, torch.device("cpu"))
    if in_one_row:
        starts = torch.tensor([0, *accumulate(map(len, ids[:-1]))])
        places, rows = inputs["where"][places + starts[rows]], torch.zeros_like(rows)
    return {
        **inputs,
        "rows": rows,
        "places": places,
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
        sums: Terms = {}
        gradients: dict[int, Tensor] = {}
        for part in batch["parts"]:
            terms = _part_terms(model, part, weights)
            of_part = torch.autograd.grad(torch.stack(list(terms.values())).sum(), trained, allow_unused=True)
            _add(gradients, {index: one for index, one in enumerate(of_part) if one is not None})
            sums = {term: value.detach() + sums.get(term, 0.0) for term, value in terms.items()}
        # Nothing in value, with the parts' gradients: the trainer goes backward through it as through any loss.
        reached = [trained[index] for index in gradients]
        nothing: Tensor | float = _Given.apply(list(gradients.values()), *reached) if reached else 0.0
        # Where the terms are; what is trained may lie on other GPUs.
        device = batch["parts"][0]["input_ids"].device
        sums[TERMS[0]] = sums[TERMS[0]] + (nothing.to(device) if isinstance(nothing, Tensor) else nothing)
        return sums

    return loss


def _add(sums: dict[int, Tensor], more: Mapping[int, Tensor]) -> None:
    """Add gradients to those that there are, all in one operation where they are on one device."""
    again = [index for index in more if index in sums]
    if again:
        torch._foreach_add_([sums[index] for index in again], [more[index] for index in again])
    sums.update({index: one for index, one in more.items() if index not in sums})


class _Given(torch.autograd.Function):
    """A loss of 0 whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *trained: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=trained[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The trainer divides by its parts, and in float16 multiplies by a scale.
        one_device = len({one.device for one in ctx.gradients}) == 1
        if one_device:
            return None, *torch._foreach_mul(ctx.gradients, upstream[0].to(ctx.gradients[0]))
        return None, *(one * upstream[0].to(one) for one in ctx.gradients)


class SequenceObjective(PackedObjective):
    """Groups of sequences, trained toward soft targets in forwards of as many tokens as fit."""

    tokens_at_once: int
    """Tokens of one forward, at most."""

    def collate(self, rows: list[Sequence[TrainingSequence]]) -> dict[str, Any]:
        """Parts, each a forward of its own."""
        return collate(rows, self.tokens_at_once, in_one_row=self.in_one_row)

    def pieces(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts, each a batch."""
        return [{"parts": [part]} for part in batch["parts"]]

    def less(self) -> bool:
        """Half as many tokens in a forward."""
        if self.tokens_at_once <= FEWEST_TOKENS:
            return False
        self.tokens_at_once //= 2
        return True


class SequenceTraining(SequenceObjective, Training):
    """The same, as a recipe trains it."""

    weighted_loss: Loss

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """The divergence from the targets; of ELM this is equation 10."""
        return self.weighted_loss(model, batch)


TARGET_BYTES = 12
"""Of one stored token of a target: its id and its log-probability."""
FEWEST_TOKENS = 8
"""Tokens of a forward below which a row alone is read in any case."""


def _part_terms(model: nn.Module, part: Mapping[str, Any], weights: Mapping[str, float]) -> Terms:
    if "blocks" in part:
        hidden = read_packed(model, part)[part["places"]]
    else:
        padded = final_hidden(model, {key: part[key] for key in ("input_ids", "attention_mask")})
        hidden = padded[part["rows"], part["places"]]
    targets = SoftTargets(part["target_ids"], part["log_p"], part["rest"])
    weighted = soft_divergence(hidden, unembedding(model), targets) * part["weights"]
    sums = weighted.new_zeros(len(TERMS)).index_add(0, part["terms"], weighted)
    return {term: sums[index] * weights[term] for index, term in enumerate(TERMS)}
