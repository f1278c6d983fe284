"""Trainings from the same seed and data that differ in what is ablated, and what is seen of each."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...artifacts.events import Events
from ...artifacts.files.opened import Telling
from ...artifacts.files.written import read_sealed, write_sealed
from ...artifacts.models.load import LoadedModel
from ...artifacts.models.memory import release_memory
from ...artifacts.reporting.results import measurements_as_json
from ...editing.directions.sae_latents import SparseLatents
from ...editing.directions.subspaces import Subspace
from ...editing.errors import RequestError
from ...editing.hooks.concept_ablation import concept_ablated
from ...editing.modules import causal_model
from ...eval.concept import ContrastPair
from ...eval.measurements.behaviour import learned
from ...eval.measurements.multiple_choice import scores as multiple_choice
from ...eval.statistics import summarize
from ..common import adapter_job, adapter_run
from ..common.examples import Example, completion_loss
from ..common.measured_run import subject_of
from ..common.packed_training import packed_examples
from ..common.trainer import fit
from .direction_sources import SOURCES, Readings, SourceInputs, mean_projection, refreshed
from .request import CaftJob

Part = TypeVar("Part", Subspace, SparseLatents)


READ_ROWS = 256
"""Training sequences, and contrast pairs, that directions are learned from, at most."""


@dataclass(frozen=True)
class Control:
    scores: list[dict[str, Any]]
    readings: Readings


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

    @contextmanager
    def ablated(self, model: Any, removed: Sequence[Subspace | SparseLatents]) -> Iterator[None]:
        """What holds while a model trains; with nothing to remove nothing is ablated."""
        settings = self.prepared.settings
        # Held, so that the monitor can pause it.
        with concept_ablated(
            model, self.prepared.adapter.run.row, removed, settings.mode, settings.value
        ) as self.ablation:
            yield

    def read(self, most: int = READ_ROWS) -> Readings:
        """The stream of the model as it is now, where something is to be said."""
        return Readings.of(self.loaded.model, self.prepared.adapter.run.row, self.watched[:most], self.prepared.places)

    def control(self, name: str, removed: Sequence[Subspace | SparseLatents]) -> Control:
        """Train, read and measure a model that is then thrown away."""
        prepared, settings = self.prepared, self.prepared.settings
        with adapter_run.being_trained(prepared.adapter, self.loaded.model) as tuned:
            model = tuned.model
            with (
                self.events.stage(f"train the control: {name}", settings.steps) as stage,
                packed_examples(model) as collate,
                self.ablated(model, removed),
            ):
                schedule = adapter_job.schedule_of(prepared.adapter, save_every=0)
                fit(
                    model,
                    self.order,
                    stage,
                    self.work / f"control-{name}",
                    completion_loss,
                    schedule,
                    collate,
                    products=adapter_job.products_of(prepared.adapter),
                )
            model.eval()
            readings = self.read()
            subject = subject_of(
                prepared.adapter.run, LoadedModel(causal_model(model), self.loaded.tokenizer, self.loaded.source)
            )
            with self.events.stage(f"measure the control: {name}"):
                scores = [*multiple_choice(subject), *learned(subject)]
        # What the adapter leaves behind is in cycles of references, and the next control needs its memory.
        release_memory()
        return Control(
            measurements_as_json([summarize(item, "edited") for item in scores if not item.is_empty]), readings
        )


class DriftMonitor:
    """Looks, while training and with the ablation paused, at where the stream goes and whether the concept moved
    elsewhere."""

    def __init__(self, trial: ControlRuns, subspaces: Sequence[Subspace], path: Path):
        self.trial, self.subspaces, self.path = trial, subspaces, path
        self.rows = trial.prepared.settings.watch
        self.base = trial.read(self.rows) if subspaces and self.rows else Readings()

    def __call__(self, step: int) -> None:
        # Steps 1, 2, 4 and so on, and the last: step & (step - 1) is 0 for powers of two.
        if step & (step - 1) and step != self.trial.prepared.settings.steps:
            return
        model = self.trial.loaded.model
        training = model.training
        model.eval()
        with self.trial.ablation.pause():
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
