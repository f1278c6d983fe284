"""What a training minimizes: its rows, how a batch is made of them, and the loss of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .trainer import Terms


class Objective(ABC):
    """Rows and a loss. One that is to be shared by several processes holds no model and can be pickled, because each of
    them computes a part of every step."""

    rows: Sequence[Any]
    """What batches are made of; each is used at most once an epoch."""

    @abstractmethod
    def collate(self, rows: list[Any]) -> Any:
        """A batch of some rows."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> Terms:
        """Terms of the mean loss of a batch, each weighted already."""

    def pieces(self, batch: Any) -> list[Any]:
        """Batches of one forward each, whose losses add up to that of the batch: of a sharded model, every process takes
        as many forwards as the others."""
        return [batch]

    def while_training(self, model: Any) -> AbstractContextManager[object]:
        """What holds of the model while it trains, and only then."""
        return nullcontext()

    def less(self) -> bool:
        """Compute less of a row at once, because memory ran out; says whether the loss can."""
        return False
