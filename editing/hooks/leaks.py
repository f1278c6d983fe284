"""The leak check: what still reaches the residual stream along a removed direction, on real inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..architectures import Architecture
from ..errors import EditError
from .residual_stream import run_decoder, written


@dataclass(frozen=True)
class Writes:
    """Root mean squares, over positions, of what one sublayer writes."""

    layer: int | None
    sublayer: str
    along: float
    """Component in the subspace."""
    norm: float


@dataclass(frozen=True)
class Leak:
    """What is left of one sublayer's write along the subspace."""

    layer: int | None
    sublayer: str
    share: float
    """Component after over component before."""
    of_write: float
    """Component after over the norm of the write."""
    expected: float
    """Share that the edit means to leave: 0 where its strength is 1, 1 where it leaves the layer alone."""


@torch.no_grad()
def measure_writes(
    model: nn.Module, row: Architecture, basis: Float[Tensor, "d k"], batches: Iterable[dict[str, Tensor]]
) -> list[Writes]:
    """Run inputs and sum up what each sublayer writes, in float64; padding is left out."""
    sums: dict[tuple[int | None, str], list[float]] = {}
    mask: list[Tensor] = []

    def see(layer: int | None, sublayer: str, output: Tensor) -> None:
        values = output.reshape(-1, output.shape[-1])[mask[0].reshape(-1).bool()].double()
        along = (values @ basis.to(values.device).double()).square().sum()
        total = sums.setdefault((layer, sublayer), [0.0, 0.0, 0.0])
        total[0] += float(along)
        total[1] += float(values.square().sum())
        total[2] += len(values)

    with written(model, row, see):
        for batch in batches:
            mask[:] = [batch["attention_mask"]]
            run_decoder(model, batch)
    return [
        Writes(layer, sublayer, (along / count) ** 0.5, (norm / count) ** 0.5)
        for (layer, sublayer), (along, norm, count) in sums.items()
    ]


def compare_writes(
    before: Sequence[Writes], after: Sequence[Writes], layer_strengths: Sequence[float], embedding_strength: float
) -> list[Leak]:
    """What is left of each write, beside what the edit meant to leave."""
    leaks = []
    for old, new in zip(before, after, strict=True):
        assert (old.layer, old.sublayer) == (new.layer, new.sublayer)
        strength = embedding_strength if old.layer is None else layer_strengths[old.layer]
        leaks.append(
            Leak(
                old.layer,
                old.sublayer,
                share=new.along / old.along if old.along > 0 else 0.0,
                of_write=new.along / new.norm if new.norm > 0 else 0.0,
                expected=abs(1 - strength),
            )
        )
    return leaks


def check_leaks(leaks: Sequence[Leak], tolerance: float) -> None:
    """Hold every sublayer to what the edit meant to leave.

    Raises:
        EditError: More than ``tolerance`` of the component is left beyond that; the message names the worst writer.
    """
    # Rounding alone leaves a tiny part of the whole write, which may be much of a component that was tiny before.
    found = [leak for leak in leaks if leak.share > leak.expected + tolerance and leak.of_write > tolerance / 10]
    if found:
        worst = max(found, key=lambda leak: leak.share)
        place = "the embedding" if worst.layer is None else f"{worst.sublayer} of layer {worst.layer}"
        raise EditError(
            f"{place} still writes {worst.share:.1%} of its component along the direction ({len(found)} writers leak); "
            "the architecture's row misses a writer, or the checkpoint is stored in too few bits"
        )
