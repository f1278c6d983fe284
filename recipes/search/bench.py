"""The base on its bench: loaded and measured once, edited for each trial, and the base again after it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.edits.in_place import edits_in_place
from ...eval.concept import Concept
from ...eval.drawing import drawn
from ...eval.inference.generation import Reply, batched_log_probabilities
from ...eval.items import clusters_of
from ...eval.measurements.behaviour import degenerate, rates
from ...eval.measurements.table import scores_of
from ...eval.model_under_test import Baseline, EvalSettings, ModelUnderTest
from ...eval.statistics import Scores
from ..common.measured_job import Job
from .figures import LIKELIHOOD, OWNERS, Figure

FEW = 16
"""Items of a kind that every trial is measured on first; of prompts an eighth, because replies cost most."""
BY_SPLIT = {"behaviour_rate": rates, "degenerate_share": degenerate}


@dataclass
class Sitting:
    """One model on some of the items, with everything that was measured so far."""

    subject: ModelUnderTest
    replies: Sequence[Reply]
    """The base's to the prompts on the concept."""
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    done: set[tuple[str, str]] = field(default_factory=set)

    def value(self, figure: Figure) -> float:
        """A figure's value; NaN where nothing could be measured."""
        name = figure.measurement
        # Replies of one split need not wait for those of the other; all else is measured in one go.
        key = (name, figure.split if name in BY_SPLIT else "")
        if key not in self.done:
            self.done.add(key)
            if name == LIKELIHOOD:
                self.scores[name, "concept"] = likelihood(self.subject.model, self.replies)
            elif name in BY_SPLIT:
                self._keep(BY_SPLIT[name](self.subject, (figure.split,)))
            else:
                self._keep(scores_of(OWNERS.get(name, name), self.subject))
        return self.scores.get((name, figure.split), math.nan)

    def _keep(self, scores: Sequence[Scores]) -> None:
        for one in scores:
            self.scores[one.name, one.split] = math.nan if one.is_empty else one.value()

    @property
    def generated(self) -> int:
        """Tokens of replies to open prompts so far."""
        prompts = ("concept", "neutral")
        # What was never asked for must not be generated to be counted.
        return sum(len(reply.ids) for split in prompts for reply in self.subject.generated(split))


@torch.no_grad()
def likelihood(model: Any, replies: Sequence[Reply]) -> float:
    """Mean log-probability per token that a model gives to some replies, in nats; NaN where there are none."""
    total, count = 0.0, 0
    for index, log_p in batched_log_probabilities(model, replies):
        ids = torch.tensor(replies[index].ids)
        total += float(log_p[torch.arange(len(ids)), ids].sum())
        count += len(ids)
    return total / count if count else math.nan


class Bench:
    """A loaded base, measured on the items that a search chooses by."""

    def __init__(self, job: Job, loaded: LoadedModel, prompts: int, few: int = FEW):
        """Measure what trials are compared with.

        Args:
            job: A checked request whose measured half is the one that chooses.
            prompts: Prompts of a split that replies are made to, at most.
            few: Items that come first.
        """
        self.loaded, self.checkpoint = loaded, job.checkpoint
        self.config = loaded.model.config.to_dict()
        settings = job.settings.measuring()
        every = _with_prompts(job.measured, prompts)
        self.concepts = {"all": every, "few": _with_prompts(every, max(4, prompts // 8))}
        sizes = {"few": replace(settings, questions=few, kl_prompts=few), "all": settings}
        self.settings: dict[str, EvalSettings] = sizes
        base = ModelUnderTest(loaded.model, loaded.tokenizer, self.concepts["all"], settings)
        whole = base.baseline()
        self.baselines = {"few": _first(whole, few), "all": whole}
        replies = dict(zip((one.id for one in base.prompts("concept")), base.replies("concept"), strict=True))
        self.replies = {
            size: [replies[one.id] for one in concept.prompts if one.split == "concept" and replies[one.id].ids]
            for size, concept in self.concepts.items()
        }
        self.base = {"all": Sitting(base, self.replies["all"])}
        self.base["few"] = self._sit("few", None)
        self.shared: dict[str, Any] = {}
        """What trials have in common, for recipes."""

    @contextmanager
    def edited(self, edit: WeightEdit) -> Iterator[dict[str, Sitting]]:
        """The edited model on few and on all items, as long as the context lasts."""
        with edits_in_place(self.loaded.model, self.config, originals_of(self.checkpoint, self.loaded.model)) as tries:
            tries.apply(edit)
            yield {size: self._sit(size, self.baselines[size]) for size in ("few", "all")}

    def measure_base(self, figures: Sequence[Figure]) -> None:
        """Measure the base where figures are compared with it; while it is edited, it would be the edit that is measured."""
        for sitting in self.base.values():
            for one in figures:
                if one.change or (not one.generates and one.measurement != "kl_from_base"):
                    sitting.value(one)

    def value(self, figure: Figure, sitting: Sitting, size: str) -> float:
        """A figure of a sitting, less the base's on the same items where its name says so."""
        value = sitting.value(figure)
        return value - self.base[size].value(figure) if figure.change else value

    def of_base(self, figure: Figure, size: str) -> float:
        """A figure of the unchanged base, which moves nothing."""
        if figure.change or figure.measurement == "kl_from_base":
            return 0.0
        return self.base[size].value(figure)

    def _sit(self, size: str, baseline: Baseline | None) -> Sitting:
        subject = ModelUnderTest(
            self.loaded.model, self.loaded.tokenizer, self.concepts[size], self.settings[size], baseline
        )
        return Sitting(subject, self.replies[size])


def _with_prompts(concept: Concept, most: int) -> Concept:
    """The pack with at most so many prompts of each split."""
    chosen: list[Any] = []
    for split in ("concept", "neutral"):
        rows = [one for one in concept.prompts if one.split == split]
        chosen += drawn(rows, clusters_of(concept, rows), most, "search")
    return replace(concept, prompts=tuple(chosen))


def _first(baseline: Baseline, count: int) -> Baseline:
    """A baseline on every so-manieth of its items."""
    replies, texts = _every(len(baseline.replies), count), _every(len(baseline.texts), count)
    return Baseline(
        [baseline.replies[place] for place in replies],
        [baseline.distributions[place] for place in replies],
        [baseline.texts[place] for place in texts],
        [baseline.text_distributions[place] for place in texts],
        tuple(baseline.prompts[place] for place in replies),
        tuple(baseline.rows[place] for place in texts),
    )


def _every(length: int, count: int) -> list[int]:
    return sorted({place * length // count for place in range(count)}) if length > count else list(range(length))
