"""Trainings whose steps read all their sequences as one row, without padding, where the model can."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...editing.training.packing import packing, recomputes
from .adapter_run import Training
from .examples import Example, example_batch


class PackedTraining(Training):
    """A training that packs the rows of a step."""

    _packing: Any = None
    """The model, while it reads packed rows."""

    @contextmanager
    def while_training(self, model: Any) -> Iterator[None]:
        """Rows are packed where the model can read them so."""
        with packing(model) as can:
            self._packing = model if can else None
            yield

    @property
    def in_one_row(self) -> bool:
        """Whether rows are packed now."""
        return self._packing is not None and not recomputes(self._packing)


@contextmanager
def packed_examples(model: Any) -> Iterator[Callable[[Sequence[Example]], dict[str, Any]]]:
    """Yields what makes a batch of examples, packed where the model can read it so while the context lasts."""
    with packing(model) as can:
        yield lambda examples: example_batch(examples, in_one_row=can and not recomputes(model))
