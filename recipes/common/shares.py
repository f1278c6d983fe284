"""How the processes that hold a sharded model divide a step: each computes some of its rows, with the same gradient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .step_parts import Part, split

SHARDED_ADVICE = (
    "set gradient_accumulation_steps higher or gradient_checkpointing=true, start more processes, or use devices with more"
    " memory; then run the command again with --resume"
)


@dataclass(frozen=True)
class Shares:
    """What one of several processes computes of each step."""

    rank: int
    count: int
    """Processes."""
    pieces: Callable[[Any], list[Any]]
    """Batches of one forward each, whose losses add up to that of a batch."""
    resume: str | None = None
    """The state that all of them go on from."""

    def of(self, rows: Sequence[Any], parts: int, collate: Callable[[list[Any]], Any]) -> list[Part]:
        """This process's parts of a step: as many forwards as in every other process, because in each of them the
        processes gather the weights from one another.

        Args:
            rows: All rows of the step, the same in every process.
            parts: Parts that the step is computed in at least.
        """
        forwards = [
            Part(piece, part.divisor)
            for part in split(rows, self.count * -(-parts // self.count), collate)
            for piece in self.pieces(part.batch)
        ]
        own = forwards[self.rank :: self.count]
        if len(own) < -(-len(forwards) // self.count):
            # Nothing is left for this process: it takes part in a forward that counts nothing.
            own.append(Part(forwards[0].batch, math.inf))
        # The library makes the mean of the processes' gradients, and the step's is their sum.
        return [Part(part.batch, part.divisor / self.count) for part in own]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of what each of them has."""
        import torch.distributed as dist

        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.count

    def all_have_written(self) -> bool:
        """Wait until every process has written its files; says whether this one closes what all wrote."""
        import torch.distributed as dist

        dist.barrier()
        return self.rank == 0
