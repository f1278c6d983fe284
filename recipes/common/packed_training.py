"""Trainings whose steps read all their sequences as one row, without padding, where the model can."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...editing.errors import UnsupportedArchitecture
from ...editing.training.packing import packing, recomputes
from ...editing.wiring.small_copy import small_copy
from .adapter_job import AdapterJob
from .adapter_run import Training
from .examples import Example, example_batch
from .memory_sizes import Rows, largest_packed
from .objective import Objective


class PackedObjective(Objective):
    """An objective that packs the rows of a step."""

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


class PackedTraining(PackedObjective, Training):
    """A training that packs the rows of a step."""


def planned_rows(job: AdapterJob, batches: Sequence[Sequence[int]]) -> Rows:
    """The largest of some batches by the lengths of their sequences, packed where the model can."""
    if job.settings.gradient_checkpointing or not packs(job.run.checkpoint.config):
        return Rows(max(map(len, batches)), max(map(max, batches)))
    return largest_packed(batches)


_found: dict[str, bool] = {}


def packs(config: dict[str, Any]) -> bool:
    """Whether a model of this configuration reads packed rows; tried out on a small copy of it, once."""
    key = json.dumps(config, sort_keys=True)
    if key not in _found:
        _found[key] = _copy_packs(config)
    return _found[key]


def _copy_packs(config: dict[str, Any]) -> bool:
    try:
        model = small_copy(config)
        model.set_attn_implementation("sdpa")
    except (UnsupportedArchitecture, ValueError):
        return False
    with packing(model) as can:
        return can


@contextmanager
def packed_examples(model: Any) -> Iterator[Callable[[Sequence[Example]], dict[str, Any]]]:
    """Yields what makes a batch of examples, packed where the model can read it so while the context lasts."""
    with packing(model) as can:
        yield lambda examples: example_batch(examples, in_one_row=can and not recomputes(model), every=False)
