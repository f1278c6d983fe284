"""Representation tuning (LoRRA): an adapter moves the stream along a reading vector, toward a concept or away.

Zou et al. 2023, section 3.2 and algorithm 1. No text is imitated: where prompts show the concept, the target is the
frozen model's own stream with the vector added; on other prompts, on replies and on retain texts it is that stream as
it is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts.checkpoints.directions import FILE, save_directions
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.directions.reading_vector import ReadingVector, distance
from ...editing.edits.base import WeightEdit
from ...editing.hooks.residual_stream import read_streams
from ...editing.modules import causal_model
from ...eval.concept import ContrastPair
from ...eval.inference.chat import encode_prompt
from ...eval.inference.generation import generate
from ...eval.inference.likelihood import pad_right
from ..common import adapter_run
from ..common.adapter_run import Training
from ..common.examples import cycled
from ..common.measured_run import Finished
from ..common.memory_plan import MemoryPlan, RunMemory
from ..common.memory_sizes import Rows, largest_of
from ..common.step_parts import COUNTS
from ..common.tokens import Row, encode, end_positions
from ..common.trainer import Terms
from .request import LorraJob, LorraSettings, describe, prepare
from .story import story
from .vectors import BATCH, Prompts, along, reading_vectors

__all__ = ["LorraSettings", "describe", "learn", "memory", "prepare", "run", "story"]

READ_PAIRS = 256
"""Most contrast pairs that the vector is read from."""
LAST = 64
"""First tokens of a text whose stream is to stay where it is."""
REPLY = 24
"""Tokens of a reply whose stream is to stay where it is."""


def memory(job: LorraJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, concept = RunMemory.of(job.adapter.run), job.adapter.concept
    pairs = [text for pair in concept.contrast for text in (pair.positive, pair.negative)]
    longest, texts = needs.longest(pairs, needs.context), needs.longest((text.text for text in concept.retain), LAST)
    read = Rows(BATCH, longest)
    if needs.tokenizes():
        _, prompts = _prompts(job, needs.tokenizer)
        sides = [largest_of([len(row) for row in side], BATCH) for side in (prompts.positive, prompts.negative)]
        read = max(sides, key=lambda rows: rows.tokens)
        longest = max(len(row) for row in (*prompts.positive, *prompts.negative))
    reply = REPLY if concept.about.kind == "behaviour" else 0
    # Prompts that are moved, prompts that stay, and texts.
    rows = Rows(3 * job.settings.batch_size, max(longest + reply, texts))
    # The base's stream stands beside the trained one; targets are in fp32.
    beside = 3 * 4 * rows.tokens * needs.sizes.width * len(job.places)
    reading = needs.reading("read the vectors", read, points=len(job.places))
    deepest = max(place.layer for place in job.places)
    return needs.measured_run([reading, needs.training(job.adapter, rows, work=beside, deepest=deepest)])


def run(job: LorraJob, events: Events) -> Finished:
    """Do the whole run: read the vectors, train, merge, measure, publish."""
    way = "toward" if job.settings.strength > 0 else "away from"
    return adapter_run.run(job.adapter, f"tuned {way} a reading vector", partial(_training, job), events)


def learn(job: LorraJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(job.adapter, loaded, partial(_training, job), work, events)


def _training(job: LorraJob, loaded: LoadedModel, events: Events, work: Path) -> "LorraTraining":
    """Everything before the first gradient step."""
    settings, concept = job.settings, job.adapter.concept
    chat = concept.about.kind == "behaviour"
    pairs, prompts = _prompts(job, loaded.tokenizer)
    positions = end_positions(settings.positions, [*prompts.positive, *prompts.negative], chat)
    with events.stage("read the vectors", len(pairs)) as stage:
        vectors = reading_vectors(job, loaded, prompts, stage.advance)
    provenance = {"model": job.adapter.run.source.describe(), "seed": settings.seed, "concept": concept.ref}
    save_directions([vector.subspace.with_provenance(provenance) for vector in vectors], work / FILE)
    replies = _replies(loaded, [pair.negative for pair in pairs], events) if chat else [()] * len(pairs)
    texts = [encode(loaded.tokenizer, text.text, True) for text in concept.retain]
    passages = _passages(settings, prompts, replies, texts)
    long_texts = sum(len(row) > LAST for row in texts)
    return LorraTraining(job, loaded, vectors, prompts, passages, positions, long_texts)


def _prompts(job: LorraJob, tokenizer: Any) -> tuple[list[ContrastPair], Prompts]:
    """The contrast pairs that the vector is read from, and what of them is read."""
    concept = job.adapter.concept
    chat = concept.about.kind == "behaviour"
    pairs = random.Random(f"excise contrast {job.settings.seed}").sample(
        concept.contrast, k=min(READ_PAIRS, len(concept.contrast))
    )
    sides = [
        [tuple(encode_prompt(tokenizer, text, chat=chat)) for text in side]
        for side in ([pair.positive for pair in pairs], [pair.negative for pair in pairs])
    ]
    return pairs, Prompts(*sides)


@dataclass(frozen=True)
class Passage:
    """A prompt with the beginning of a reply, or a text."""

    ids: Row
    start: int
    """Where the reply begins; 0 of a text."""
    moved: bool


def _passages(
    settings: LorraSettings, prompts: Prompts, replies: Sequence[Row], texts: Sequence[Row]
) -> dict[str, list[Passage]]:
    """Prompts that are moved, prompts that stay, and texts, which stay too."""
    sequences = [
        Passage(prompt + reply, len(prompt), settings.moved in (side, "both"))
        for side, rows in (("positive", prompts.positive), ("negative", prompts.negative))
        for prompt, reply in zip(rows, replies, strict=True)
    ]
    return {
        "moved": [one for one in sequences if one.moved],
        "kept": [one for one in sequences if not one.moved],
        "texts": [Passage(row[:LAST], 0, False) for row in texts if row],
    }


def _replies(loaded: LoadedModel, prompts: Sequence[str], events: Events) -> list[Row]:
    """What the base says to prompts without the concept: behind either prompt, its stream is to stay as it is."""
    with events.stage("let the base reply", len(prompts)) as stage:
        return [reply.ids for reply in generate(loaded.model, loaded.tokenizer, prompts, REPLY, stage.advance)]


class LorraTraining(Training):
    """The loss: how far the stream is from where it should be, in distances between the classes, mean over places."""

    def __init__(
        self,
        job: LorraJob,
        loaded: LoadedModel,
        vectors: Sequence[ReadingVector],
        prompts: Prompts,
        passages: dict[str, list[Passage]],
        positions: int,
        long_texts: int,
    ):
        settings = job.settings
        self.job, self.prompts, self.passages, self.positions = job, prompts, passages, positions
        self.long_texts = long_texts
        # Point l + 1 of the stream is the output of layer l.
        self.vectors = {vector.subspace.place.layer + 1: vector for vector in vectors}
        count = settings.steps * settings.batch_size
        orders = [
            cycled(kind, count, random.Random(f"excise lorra {name} {settings.seed}"))
            for name, kind in passages.items()
            if kind
        ]
        self.rows = [*zip(*orders, strict=True)]
        self.checked_rows = [one.ids for kind in passages.values() for one in kind[:8]]
        longest = max(len(passage.ids) for row in self.rows for passage in row)
        self.step_rows, self.deepest = Rows(len(self.rows[0]) * settings.batch_size, longest), max(self.vectors) - 1
        self.along_base = along(job, loaded.model, vectors, prompts)

    def collate(self, rows: list[tuple[Passage, ...]]) -> dict[str, Any]:
        """``moved`` marks the last positions of prompts that are moved, ``ends`` of those that are not, ``rest``
        replies and texts."""
        passages = [one for kind in zip(*rows, strict=True) for one in kind]
        inputs = pad_right([one.ids for one in passages], torch.device("cpu"))
        place, real = torch.arange(inputs["input_ids"].shape[1]), inputs["attention_mask"].bool()
        start = torch.tensor([[one.start] for one in passages])
        moved = torch.tensor([[one.moved] for one in passages])
        end = (place < start) & (place >= start - self.positions)
        masks = {"moved": end & moved, "ends": end & ~moved, "rest": real & (place >= start)}
        return {**inputs, **masks, COUNTS: {name: int(mask.sum()) for name, mask in masks.items()}}

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """Algorithm 1: moved positions toward the base's stream plus the vector, all others toward the base's
        stream."""
        row, settings, device = self.job.adapter.run.row, self.job.settings, next(model.parameters()).device
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        masks = {name: batch[name].to(device) for name in ("moved", "ends", "rest")}
        with torch.no_grad(), model.disable_adapter():
            base = read_streams(causal_model(model), row, inputs, list(self.vectors))
        stream = read_streams(causal_model(model), row, inputs, list(self.vectors))
        terms: dict[str, list[Tensor]] = {name: [] for name in masks}
        for point, vector in self.vectors.items():
            still = base[point].float()
            targets = {"moved": still + settings.strength * vector.step.to(device), "ends": still, "rest": still}
            for name, mask in masks.items():
                # In distances between the classes, because the stream grows from layer to layer.
                terms[name].append(distance(stream[point], targets[name], mask) / vector.gap)
        weights = {"moved": 1.0, "ends": settings.retain_weight, "rest": settings.retain_weight}
        return {name: weights[name] * torch.stack(values).mean() for name, values in terms.items()}

    def report(self, model: Any) -> dict[str, Any]:
        """What was trained, and where the classes lie along each vector before and after."""
        settings, counts = self.job.settings, {name: len(kind) for name, kind in self.passages.items()}
        cut = f"; of {self.long_texts} texts the first {LAST} tokens" if self.long_texts else ""
        training = {
            "about": "Representation tuning.",
            "steps": settings.steps,
            "rows": len(self.rows[0]) * settings.batch_size,
            "data": (
                f"{counts['moved']} prompts moved, {counts['kept']} prompts and {counts['texts']} texts kept, and"
                f" replies{cut}"
            ),
            "lessons": counts,
        }
        lorra = {
            "reading": settings.reading,
            "strength": settings.strength,
            "moved": settings.moved,
            "positions": self.positions,
            "gaps": {str(vector.subspace.place): vector.gap for vector in self.vectors.values()},
            "pairs": len(self.prompts.positive),
            "along": {
                "base": self.along_base,
                "edited": along(self.job, causal_model(model), list(self.vectors.values()), self.prompts),
            },
        }
        return {"training": training, "warnings": list(self.job.adapter.warnings), "lorra": lorra}
