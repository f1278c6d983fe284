"""Trainings from the same seed and data that differ in what is ablated, and what is seen of each."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.events import Events
from ...artifacts.files.opened import Telling
from ...artifacts.files.written import read_sealed, write_sealed
from ...artifacts.models.load import LoadedModel
from ...artifacts.models.memory import release_memory
from ...artifacts.reporting.results import measurements_as_json
from ...editing.directions.sae_latents import SparseLatents
from ...editing.directions.subspaces import Subspace
from ...editing.edits.base import WeightEdit
from ...editing.edits.in_place import edits_in_place
from ...editing.errors import EditError, RequestError
from ...editing.hooks.concept_ablation import Ablation, Mode, Value, concept_ablated
from ...editing.wiring.row import Architecture
from ...eval.concept import ContrastPair
from ...eval.measurements.behaviour import learned
from ...eval.measurements.multiple_choice import scores as multiple_choice
from ...eval.statistics import Scores, summarize
from ..common import adapter_job, adapter_run
from ..common.examples import Example, completion_loss, example_batch
from ..common.measured_run import subject_of
from ..common.packed_training import PackedObjective
from ..common.sharded_run import fit_objective
from ..common.trainer import Terms
from .direction_sources import SOURCES, Readings, SourceInputs, mean_projection, refreshed
from .request import CaftJob

Part = TypeVar("Part", Subspace, SparseLatents)


READ_ROWS = 256
"""Training sequences, and contrast pairs, that directions are learned from, at most."""


@dataclass(frozen=True)
class Control:
    scores: list[dict[str, Any]]
    readings: Readings


@dataclass
class AblatedFineTuning(PackedObjective):
    """Completions, learned while directions are ablated."""

    rows: Sequence[Example]
    row: Architecture
    removed: tuple[Subspace | SparseLatents, ...]
    mode: Mode
    value: Value
    ablation: Ablation | None = None
    """While it trains."""

    def collate(self, rows: list[Example]) -> dict[str, Any]:
        """Sequences as one forward reads them."""
        return example_batch(rows, in_one_row=self.in_one_row, every=False)

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """Of the completions."""
        return completion_loss(model, batch)

    @contextmanager
    def while_training(self, model: Any) -> Iterator[None]:
        """The ablation, on packed rows."""
        with super().while_training(model):
            with concept_ablated(model, self.row, self.removed, self.mode, self.value) as self.ablation:
                yield
            self.ablation = None

    def pause(self) -> AbstractContextManager[None]:
        """Switch the ablation off while the context lasts."""
        return self.ablation.pause() if self.ablation else nullcontext()


class ControlRuns:
    """Trainings from the same seed and data that differ in what is ablated."""

    def __init__(
        self,
        prepared: CaftJob,
        loaded: LoadedModel,
        watched: Sequence[Example],
        order: Sequence[Example],
        events: Events,
        work: Path,
    ):
        self.prepared, self.loaded, self.watched, self.order = prepared, loaded, watched, order
        self.events, self.work = events, work
        self.base = self.read()

    def objective(self, removed: Sequence[Subspace | SparseLatents]) -> "AblatedFineTuning":
        """What is trained; with nothing to remove nothing is ablated."""
        settings = self.prepared.settings
        return AblatedFineTuning(
            self.order, self.prepared.adapter.run.row, tuple(removed), settings.mode, settings.value
        )

    def read(self, most: int = READ_ROWS) -> Readings:
        """The stream of the model as it is now, where something is to be said."""
        return Readings.of(self.loaded.model, self.prepared.adapter.run.row, self.watched[:most], self.prepared.places)

    def control(self, name: str, removed: Sequence[Subspace | SparseLatents]) -> Control:
        """Train, read and measure a model that is then thrown away."""
        prepared, settings = self.prepared, self.prepared.settings
        with adapter_run.being_trained(prepared.adapter, self.loaded.model) as tuned:
            model = tuned.model
            with self.events.stage(f"train the control: {name}", settings.steps) as stage:
                fit_objective(
                    model,
                    self.objective(removed),
                    stage,
                    self.work / f"control-{name}",
                    adapter_job.schedule_of(prepared.adapter, save_every=0),
                    prepared.adapter.run.row.layers,
                    products=adapter_job.products_of(prepared.adapter),
                )
            model.eval()
            readings, edit = self.read(), tuned.edit({})
            quantized = prepared.adapter.base_bits != 16
            if quantized:
                # Weights in 4 bits take no update.
                scores = self._measured(name)
        # What the adapter leaves behind is in cycles of references, and the next control needs its memory.
        release_memory()
        if not quantized:
            scores = self._measured_as_exported(name, edit)
        return Control(
            measurements_as_json([summarize(item, "edited") for item in scores if not item.is_empty]), readings
        )

    def _measured_as_exported(self, name: str, edit: WeightEdit) -> list[Scores]:
        """With what was learned in the weights, as the edited model is measured; decoding is faster so, too."""
        job, model = self.prepared.adapter.run, self.loaded.model
        with edits_in_place(model, job.checkpoint.config, originals_of(job.checkpoint, model)) as tries:
            if not any(change.changed for change in tries.apply(edit)):
                raise EditError(
                    f"the control {name} changed no weight as it would be stored; train longer or at a higher rate"
                )
            return self._measured(name)

    def _measured(self, name: str) -> list[Scores]:
        subject = subject_of(self.prepared.adapter.run, self.loaded)
        with self.events.stage(f"measure the control: {name}"):
            return [*multiple_choice(subject), *learned(subject)]


class DriftMonitor:
    """Looks, while training and with the ablation paused, at where the stream goes and whether the concept moved
    elsewhere."""

    def __init__(self, trial: ControlRuns, subspaces: Sequence[Subspace], path: Path, objective: AblatedFineTuning):
        self.trial, self.subspaces, self.path, self.objective = trial, subspaces, path, objective
        self.rows = trial.prepared.settings.watch
        self.base = trial.read(self.rows) if subspaces and self.rows else Readings()

    def looks(self, step: int) -> bool:
        """At steps 1, 2, 4 and so on, and the last, where there are directions to look along."""
        # step & (step - 1) is 0 for powers of two.
        at = not step & (step - 1) or step == self.trial.prepared.settings.steps
        return at and bool(self.subspaces and self.rows)

    def __call__(self, step: int) -> None:
        if not self.looks(step):
            return
        model = self.trial.loaded.model
        training = model.training
        model.eval()
        with self.objective.pause():
            now = self.trial.read(self.rows)
            record = {
                "step": step,
                "projection": mean_projection(now, self.subspaces),
                "share_in_span": refreshed(now, self.base, self.subspaces),
                "found_again": self._found_again(now),
            }
        model.train(training)
        # Whole or not at all: a kill in the middle of a line would spoil the resumed run.
        earlier = [one for one in self.seen() if one["step"] < step]
        write_sealed(self.path, {"records": [*earlier, record]})

    def _found_again(self, now: Readings) -> dict[str, float]:
        """Share of the directions that the same source finds in the model as it is now which lies in the ablated
        span."""
        prepared = self.trial.prepared
        # These directions are what they are, whatever the model has become: there is nothing to find again.
        if prepared.directions or prepared.latents or prepared.settings.directions == "finetuned":
            return {}
        again = picked(directions_of(prepared, self.trial.loaded, now, None, most=self.rows), prepared.settings.pick)
        shares = {}
        for old, new in zip(self.subspaces, again, strict=True):
            left, _ = old.projector()
            shares[str(old.place)] = float((left.T @ new.basis).square().sum() / new.basis.square().sum())
        return shares

    def seen(self) -> list[dict[str, Any]]:
        """What was seen at each step; of steps that a resumed run took again, the last."""
        if not self.path.exists():
            return []
        with Telling(RequestError, "remove the run's folder and start it again").about(self.path):
            records: list[dict[str, Any]] = read_sealed(self.path)["records"]
        return records


def some_pairs(prepared: CaftJob, most: int = READ_ROWS) -> list[ContrastPair]:
    """Contrast pairs of the task, at most so many, evenly drawn."""
    pairs = prepared.adapter.run.concept.contrast
    return random.Random(f"excise contrast {prepared.settings.seed}").sample(pairs, k=min(most, len(pairs)))


def directions_of(
    prepared: CaftJob,
    loaded: LoadedModel,
    base: Readings,
    tuned: Readings | None,
    latents: SparseLatents | None = None,
    most: int = READ_ROWS,
) -> tuple[Subspace, ...]:
    """The directions of a file, the span of latents, or what another source finds; all, to pick from."""
    settings, job = prepared.settings, prepared.adapter.run
    if prepared.directions:
        return prepared.directions
    if settings.directions == "none":
        return ()
    provenance = {"model": job.source.describe(), "seed": settings.seed, "data_sha256": prepared.data.sha256}
    if latents:
        return (latents.subspace.with_provenance(provenance),)
    inputs = SourceInputs(
        loaded, job.row, prepared.places, settings.components, some_pairs(prepared, most), base, tuned
    )
    subspaces = SOURCES[settings.directions](inputs)
    return tuple(subspace.with_provenance(provenance) for subspace in subspaces)


def picked(parts: Sequence[Part], pick: Sequence[int]) -> tuple[Part, ...]:
    """Those with some indices, at every place; all where none are named."""
    return tuple(one.pick(pick) for one in parts) if pick else tuple(parts)
