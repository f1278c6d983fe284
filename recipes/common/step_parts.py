"""The parts that a step is computed in: as many as asked for, or as many as fit into memory, with the same gradient."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...editing.modules import causal_model

log = logging.getLogger(__name__)
COUNTS = "counts"
"""Key of a batch: how many items each term of its loss is a mean over, where that is not its number of rows."""
SHARES = "shares"
"""Key that ``add_shares`` adds: what each term counts in its step."""
ADVICE = (
    "give shorter texts, a lower rank or fewer layers, use --dtype bfloat16, close other programs on this device, or use"
    " a device with more memory; excise run RECIPE --dry-run shows what takes it"
)


@dataclass(frozen=True)
class Part:
    """A forward and backward of its own."""

    batch: Any
    divisor: float
    """What its loss is divided by, so that the sum over parts is the mean over the step."""


def split(rows: Sequence[Any], count: int, collate: Callable[[list[Any]], Any]) -> list[Part]:
    """Rows of a step in parts of equal size, but for the last."""
    size = -(-len(rows) // min(count, len(rows)))
    chunks = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches = [collate(chunk) for chunk in chunks]
    add_shares(batches)
    counted = len(batches) > 1 and all(isinstance(batch, dict) and SHARES in batch for batch in batches)
    return [
        Part(batch, len(batches) if counted else len(rows) / len(chunk))
        for batch, chunk in zip(batches, chunks, strict=True)
    ]


def add_shares(parts: Sequence[Any]) -> None:
    """Weigh the parts of a step by what their terms are means over, so that their mean is that of the whole step."""
    counted = [part for part in parts if isinstance(part, dict) and COUNTS in part]
    if len(counted) < 2:
        return
    totals = {term: sum(part[COUNTS][term] for part in counted) for term in counted[0][COUNTS]}
    for part in counted:
        part[SHARES] = {term: len(parts) * part[COUNTS][term] / max(1, total) for term, total in totals.items()}


@dataclass
class Room:
    """How much of a step is computed at once. Each time that memory runs out it is less, until nothing smaller is
    left."""

    parts: int
    """Parts of a step."""
    asked: int
    """Parts that the settings ask for."""
    less: Callable[[], bool] = lambda: False
    """Makes the loss itself compute less at once, where it can; says whether it did."""
    checkpointing: bool = False
    """Whether activations are computed again because they did not fit; switched on here."""
    told: bool = False

    def shrink(self, model: nn.Module, rows: int) -> bool:
        """Compute less at once: fewer rows, then less of a row's work, then activations a second time.

        Returns:
            False where nothing smaller is left.
        """
        if self.parts < rows:
            self.parts = min(rows, 2 * self.parts)
        elif not self.less() and not self.checkpoint(model):
            return False
        if not self.told:
            log.warning("memory ran out in a training step; it goes on in smaller parts, with the same gradient")
            self.told = True
        return True

    def checkpoint(self, model: nn.Module) -> bool:
        """Let activations be computed again in the backward pass; False where they are already, or cannot be."""
        inner = causal_model(model)
        if self.checkpointing or not getattr(inner, "supports_gradient_checkpointing", False):
            return False
        if getattr(inner, "is_gradient_checkpointing", False):
            return False
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        log.warning("gradient checkpointing is on: one row did not fit otherwise; steps take about a third longer")
        self.checkpointing = True
        return True

    def describe(self) -> dict[str, Any]:
        """What differs from what the settings ask for, because memory ran out or would have; empty where nothing does."""
        changed: dict[str, Any] = {}
        if self.parts > self.asked:
            changed["parts_of_a_step"] = self.parts
        if self.checkpointing:
            changed["gradient_checkpointing"] = "switched on, because one row did not fit otherwise"
        return {"memory": changed} if changed else {}

    def restore(self, model: nn.Module) -> None:
        """Switch off what was switched on here."""
        if self.checkpointing:
            causal_model(model).gradient_checkpointing_disable()
