"""The leak check: how much each sublayer still writes along a removed direction, measured on real inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import EditError
from ..numerics.wide import in_float64
from ..wiring.row import Architecture, Kind
from .residual_stream import run_decoder, written


@dataclass(frozen=True)
class Writes:
    """Size of one sublayer's writes, as root mean squares over positions, in the stream's units."""

    layer: int | None
    sublayer: str
    along: float
    """RMS of the component in the subspace."""
    norm: float
    """RMS norm of the whole write."""


@dataclass(frozen=True)
class Leak:
    """The component of one sublayer's write in the subspace, after an edit."""

    layer: int | None
    sublayer: str
    share: float
    """Component after the edit, divided by the component before."""
    of_write: float
    """Component after the edit, divided by the norm of the whole write."""
    expected: float
    """Share that the edit leaves by design: 0 at strength 1, 1 at strength 0."""


@torch.no_grad()
def measure_writes(
    model: nn.Module,
    row: Architecture,
    basis_at: Callable[[int | None], Float[Tensor, "d k"]],
    batches: Iterable[dict[str, Tensor]],
) -> list[Writes]:
    """Run inputs and measure what each sublayer writes; sums are float64 and exclude padding.

    Args:
        model: A causal language model; only its decoder runs.
        row: Its architecture.
        basis_at: Orthonormal columns for the writes of one layer, or of the embeddings where the layer is None.
        batches: Dicts of ``input_ids`` and ``attention_mask``, on the model's device.
    """
    sums: dict[tuple[int | None, str], list[float]] = {}
    mask: list[Tensor] = []

    def see(layer: int | None, sublayer: str, output: Tensor) -> None:
        seen = mask[0].to(output.device).reshape(-1).bool()
        values = in_float64(output.reshape(-1, output.shape[-1])[seen])
        along = (values @ basis_at(layer).to(values)).square().sum()
        total = sums.setdefault((layer, sublayer), [0.0, 0.0, 0.0])
        total[0] += float(along)
        total[1] += float(values.square().sum())
        total[2] += len(values)

    with written(model, row, see):
        for batch in batches:
            # The hooks are older than the batches, so each batch's mask reaches them through this list.
            mask[:] = [batch["attention_mask"]]
            run_decoder(model, batch)
    return [
        Writes(layer, sublayer, (along / count) ** 0.5, (norm / count) ** 0.5)
        for (layer, sublayer), (along, norm, count) in sums.items()
    ]


def compare_writes(
    before: Sequence[Writes],
    after: Sequence[Writes],
    row: Architecture,
    strength_at: Callable[[int | None, Kind], float],
) -> list[Leak]:
    """Compare each sublayer's writes before and after an edit; both sequences must be in the same order.

    Args:
        before: Writes of the base.
        after: Writes of the edited model.
        row: Its architecture, which says what kind of writer a sublayer holds.
        strength_at: The edit's strength at one kind of writer of a layer, or at the embeddings where the layer is None.
    """
    leaks = []
    for old, new in zip(before, after, strict=True):
        assert (old.layer, old.sublayer) == (new.layer, new.sublayer)
        kinds: set[Kind] = {"embedding"} if old.layer is None else row.kinds_in(old.sublayer)
        left = [abs(1 - strength_at(old.layer, kind)) for kind in kinds or {"attention"}]
        leaks.append(
            Leak(
                old.layer,
                old.sublayer,
                share=new.along / old.along if old.along > 0 else 0.0,
                of_write=new.along / new.norm if new.norm > 0 else 0.0,
                # A sublayer that holds both kinds may write what either of them keeps.
                expected=max(left),
            )
        )
    return leaks


def check_leaks(leaks: Sequence[Leak], tolerance: float) -> None:
    """Check that no sublayer from which the component is removed still writes it.

    Where a part of it stays by design, how much is written depends on what the sublayer now reads, so that its share is
    reported and not judged; of the weights themselves every change records the residual.

    Raises:
        EditError: A share exceeds the expected one by more than ``tolerance``; the message names the worst writer.
    """
    # Rounding leaves a tiny part of the whole write. For a component that was tiny before, that can be a large share,
    # so a leak must also be visible against the whole write.
    removed = [leak for leak in leaks if leak.expected <= tolerance]
    leaking = [leak for leak in removed if leak.share > leak.expected + tolerance and leak.of_write > tolerance / 10]
    if leaking:
        worst = max(leaking, key=lambda leak: leak.share)
        place = "the embedding" if worst.layer is None else f"{worst.sublayer} of layer {worst.layer}"
        raise EditError(
            f"{place} still writes {worst.share:.1%} of its component along the direction ({len(leaking)} writers "
            "leak); "
            "the architecture's row misses a writer, or the checkpoint is stored in too few bits"
        )
