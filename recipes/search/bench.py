"""The base on its bench: loaded and measured once, edited for each trial, and the base again after it."""

import math
from collections.abc import Iterator, Mapping, Sequence
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
TIE = 0.25
"""Nats by which the likeliest token must lead for a reply to count as known: twice the step of bfloat16 at 16."""
TIE_FLOAT32 = 0.001
BY_SPLIT = {"behaviour_rate": rates, "degenerate_share": degenerate}


@dataclass
class Sitting:
    """One model on some of the items, with everything that was measured so far."""

    subject: ModelUnderTest
    replies: Mapping[str, Reply]
    """The base's to the prompts on the concept, by the prompt's id."""
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    done: set[tuple[str, str]] = field(default_factory=set)
    part: "Sitting | None" = None
    """The same model on fewer items, whose replies need not be made again."""

    def value(self, figure: Figure) -> float:
        """A figure's value; NaN where nothing could be measured."""
        name, key = figure.measurement, _key(figure)
        if key not in self.done:
            self.done.add(key)
            if name == LIKELIHOOD:
                self._reread()
            elif name in BY_SPLIT:
                if self.part is not None and self.part.knows(figure):
                    self._take(self.part.subject.by_prompt(figure.split))
                self._keep(BY_SPLIT[name](self.subject, (figure.split,)))
            else:
                self._keep(scores_of(OWNERS.get(name, name), self.subject))
        return self.scores.get((name, figure.split), math.nan)

    def knows(self, figure: Figure) -> bool:
        """Whether a figure was measured, so that asking for it reads no model."""
        return _key(figure) in self.done

    def _reread(self) -> None:
        """Read the base's replies again: how likely they are now, and which of them the model would still make."""
        read = reread(self.subject.model, list(self.replies.values()))
        self.scores[LIKELIHOOD, "concept"] = read.likelihood
        # What the base itself replied was generated, whether it reads it the same or not.
        if self.subject.base is not None and not self.subject.settings.as_shipped:
            same = zip(self.replies.items(), read.repeated, strict=True)
            self._take({name: reply for (name, reply), repeated in same if repeated})

    def _take(self, replies: Mapping[str, Reply]) -> None:
        """Replies that this model would make too, so that they are not generated."""
        self.subject.known = {**self.subject.known, **replies}

    def _keep(self, scores: Sequence[Scores]) -> None:
        for one in scores:
            self.scores[one.name, one.split] = math.nan if one.is_empty else one.value()

    @property
    def generated(self) -> int:
        """Tokens of replies to open prompts so far."""
        prompts = ("concept", "neutral")
        # What was never asked for must not be generated to be counted.
        return sum(len(reply.ids) for split in prompts for reply in self.subject.generated(split))


def _key(figure: Figure) -> tuple[str, str]:
    """What is measured in one go: replies of one split need not wait for those of the other."""
    name = figure.measurement
    return name, figure.split if name in BY_SPLIT else ""


@dataclass(frozen=True)
class Reread:
    """What a model thinks of replies that another one made."""

    likelihood: float
    """Mean log-probability per token, in nats; NaN where there are no replies."""
    repeated: tuple[bool, ...]
    """Of each reply: whether the model would reply the same, decoding greedily."""


@torch.no_grad()
def reread(model: Any, replies: Sequence[Reply]) -> Reread:
    """Read replies of another model, without generating a token.

    A reply whose every token is the likeliest one after those before it is the greedy reply of this model too.
    """
    # Decoding rounds otherwise than reading does, so that a token which barely wins here may lose there.
    tie = TIE_FLOAT32 if next(model.parameters()).dtype == torch.float32 else TIE
    total, count, repeated = 0.0, 0, [False] * len(replies)
    for index, log_p in batched_log_probabilities(model, replies):
        ids = torch.tensor(replies[index].ids)
        total += float(log_p[torch.arange(len(ids)), ids].sum())
        count += len(ids)
        best = log_p.topk(2)
        wins = (best.indices[:, 0] == ids) & (best.values[:, 0] - best.values[:, 1] > tie)
        repeated[index] = bool(wins.all())
    return Reread(total / count if count else math.nan, tuple(repeated))


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
        replies = base.by_prompt("concept")
        self.replies = {
            size: {one.id: replies[one.id] for one in concept.prompts if one.split == "concept" and replies[one.id].ids}
            for size, concept in self.concepts.items()
        }
        self.base = {"all": Sitting(base, self.replies["all"])}
        self.base["few"] = self._sit("few", None)
        self.base["few"].subject.known = {**replies, **base.by_prompt("neutral")}
        self._is_edited = False
        self.shared: dict[str, Any] = {}
        """What trials have in common, for recipes."""

    @contextmanager
    def edited(self, edit: WeightEdit) -> Iterator[dict[str, Sitting]]:
        """The edited model on few and on all items, as long as the context lasts."""
        with edits_in_place(self.loaded.model, self.config, originals_of(self.checkpoint, self.loaded.model)) as tries:
            tries.apply(edit)
            self._is_edited = True
            try:
                few, every = (self._sit(size, self.baselines[size]) for size in ("few", "all"))
                every.part = few
                yield {"few": few, "all": every}
            finally:
                self._is_edited = False

    def measure_base(self, figures: Sequence[Figure]) -> None:
        """Measure the base where figures are compared with it; while it is edited, it would be the edit that is measured."""
        for size in ("all", "few"):
            for one in figures:
                if one.measurement != "kl_from_base":
                    self.base[size].value(one)

    def value(self, figure: Figure, sitting: Sitting, size: str) -> float:
        """A figure of a sitting, less the base's on the same items where its name says so."""
        value = sitting.value(figure)
        return value - self._base_value(figure, size) if figure.change else value

    def of_base(self, figure: Figure, size: str) -> float:
        """A figure of the unchanged base, which moves nothing."""
        if figure.change or figure.measurement == "kl_from_base":
            return 0.0
        return self._base_value(figure, size)

    def _base_value(self, figure: Figure, size: str) -> float:
        # The base is one model with the trials: measured now, its figure would be that of the trial.
        assert self.base[size].knows(figure) or not self._is_edited, f"measure_base was not called with {figure.name}"
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
