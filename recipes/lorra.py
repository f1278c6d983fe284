"""Representation tuning (LoRRA): an adapter learns to move the stream along a reading vector, toward a concept or away from it.

Zou et al. 2023, section 3.2 and algorithm 1. No text is imitated: where prompts show the concept, the target is the frozen
model's own stream with the vector added; on other prompts, on replies and on retain texts it is that stream as it is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.checkpoints.directions import FILE, save_directions
from ..artifacts.events import Events
from ..artifacts.models.load import LoadedModel
from ..editing.architectures import layer_selection, residual_width
from ..editing.directions.reading_vector import ReadingVector, by_components, by_means, distance
from ..editing.directions.subspaces import Place
from ..editing.errors import RequestError
from ..editing.hooks.residual_stream import read_streams
from ..editing.modules import causal_model
from ..editing.numerics.moments import Moments
from ..eval.inference.generation import encode_prompt, generate
from ..eval.inference.likelihood import pad_right
from .common import adapter_run
from .common.adapter_run import AdapterSettings, TrainingPlan
from .common.examples import cycled
from .common.measured_run import Finished
from .common.tokens import Row, end_positions
from .common.trainer import Terms

RECIPE = "lorra"
READ_PAIRS = 256
"""Contrast pairs that the vector is read from, at most."""
LAST = 64
"""Tokens of a text whose stream is kept where it is."""
REPLY = 24
"""Tokens of a reply whose stream is kept where it is."""
BATCH = 32


class LorraSettings(AdapterSettings):
    """Settings of representation tuning, low-rank (Zou et al. 2023, algorithm 1, unless another source is named)."""

    concept: str = "builtin:declining"
    """Concept pack with contrast pairs: builtin:NAME or a folder."""
    reading: Literal["mean", "pca"] = "mean"
    """The vector: the difference of the classes' means, or the first component of differences within pairs (paper)."""
    target_layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "0.25-0.625"
    """Layers whose output is moved (authors' code: 10, 12, ..., 20 of 32); only layers up to the last of them are adapted."""
    strength: float = -1.0
    """How far to move, where 1 is the distance between the two classes: negative tunes away, positive toward (authors' code: 5)."""
    positions: int = Field(0, ge=0)
    """Tokens at the end of a prompt that are moved, or kept; 0 takes the template's after the user's text, 3 of a plain text. The authors'
    code moves 64, and with them what the prompt is about."""
    moved: Literal["positive", "negative", "both"] = "positive"
    """Which prompts are moved; the others, and retain texts, are kept where they are (paper: both)."""
    retain_weight: float = Field(1.0, ge=0)
    """Weight of each term that keeps: of prompts, and of replies and texts; the paper has none."""
    modules: Literal["all", "attention", "mlp"] = "attention"
    """Linear modules of the adapted layers (authors' code: q_proj and v_proj)."""
    steps: int = Field(70, ge=1)
    """Optimizer steps (authors' logs: 70)."""
    batch_size: int = Field(16, ge=1)
    """Moved prompts a step, and as many kept ones and texts (authors' code: 16)."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW (authors' code: 3e-4, constant)."""


@dataclass(frozen=True)
class LorraJob:
    """A checked request."""

    adapter: adapter_run.AdapterJob
    settings: LorraSettings
    places: tuple[Place, ...]


def prepare(settings: LorraSettings, *, resume: bool = False) -> LorraJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if not settings.strength:
        raise RequestError("strength=0 moves nothing; -1 tunes away by the distance between the classes, 1 toward")
    checked = adapter_run.prepare(RECIPE, settings, resume=resume, needed=("contrast",))
    at = sorted(layer_selection(settings.target_layers, checked.job.layers))
    if min(checked.layers) > at[-1]:
        raise RequestError(
            f"layers={settings.layers} are all above layer {at[-1]}, the last whose output is moved; adapt layers at or below it"
        )
    return LorraJob(adapter_run.up_to(checked, at[-1]), settings, tuple(Place(layer) for layer in at))


def describe(prepared: LorraJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_run.describe(prepared.adapter, moved_at=[str(place) for place in prepared.places])


def run(prepared: LorraJob, events: Events) -> Finished:
    """Do the whole run: read the vectors, train, merge, measure, publish."""
    way = "toward" if prepared.settings.strength > 0 else "away from"
    how = f"tuned {way} a reading vector"
    return adapter_run.run(
        prepared.adapter, lambda loaded, seen, work: _lessons(prepared, loaded, seen, work), how, events
    )


def _lessons(prepared: LorraJob, loaded: LoadedModel, events: Events, work: Path) -> TrainingPlan:
    settings, concept = prepared.settings, prepared.adapter.concept
    chat = concept.about.kind == "behaviour"
    pairs = random.Random(f"excise contrast {settings.seed}").sample(
        concept.contrast, k=min(READ_PAIRS, len(concept.contrast))
    )
    positive = [tuple(encode_prompt(loaded.tokenizer, pair.positive, chat=chat)) for pair in pairs]
    negative = [tuple(encode_prompt(loaded.tokenizer, pair.negative, chat=chat)) for pair in pairs]
    positions = end_positions(settings.positions, [*positive, *negative], chat)
    with events.stage("read the vectors", len(pairs)) as stage:
        vectors = _vectors(prepared, loaded, positive, negative, stage.advance)
    provenance = {"model": prepared.adapter.job.source.describe(), "seed": settings.seed, "concept": concept.ref}
    save_directions([vector.subspace.from_(provenance) for vector in vectors], work / FILE)
    replies = _replies(loaded, [pair.negative for pair in pairs], events) if chat else [()] * len(pairs)
    sides = {"positive": (positive,), "negative": (negative,), "both": (positive, negative)}[settings.moved]
    sequences = [
        [_Passage(prompt + reply, len(prompt), prompts in sides) for prompt, reply in zip(prompts, replies, strict=True)]
        for prompts in (positive, negative)
    ]  # fmt: skip
    moved = [one for kind in sequences for one in kind if one.moved]
    kept = [one for kind in sequences for one in kind if not one.moved]
    rows = [tuple(loaded.tokenizer(text.text)["input_ids"]) for text in concept.retain]
    texts = [_Passage(row[:LAST], 0, False) for row in rows if row]
    cut = sum(len(row) > LAST for row in rows)
    count = settings.steps * settings.batch_size
    orders = [
        cycled(kind, count, random.Random(f"excise lorra {name} {settings.seed}"))
        for name, kind in (("moved", moved), ("kept", kept), ("texts", texts)) if kind
    ]  # fmt: skip
    row = prepared.adapter.job.row
    before = _along(loaded.model, row, prepared.places, vectors, positive, negative)

    def after(trained: Any) -> dict[str, Any]:
        found = _along(causal_model(trained), row, prepared.places, vectors, positive, negative)
        return {"lorra": {**about, "along": {"base": before, "edited": found}}}

    about = {
        "reading": settings.reading, "strength": settings.strength, "moved": settings.moved, "positions": positions,
        "gaps": {str(vector.subspace.place): vector.gap for vector in vectors}, "pairs": len(pairs),
    }  # fmt: skip
    training = {
        "about": "Representation tuning.", "steps": settings.steps, "rows": len(orders) * settings.batch_size,
        "data": f"{len(moved)} prompts moved, {len(kept)} prompts and {len(texts)} texts kept, and replies"
        + (f"; of {cut} texts the first {LAST} tokens" if cut else ""),
        "lessons": {"moved": len(moved), "kept": len(kept), "texts": len(texts)},
    }  # fmt: skip
    return TrainingPlan(
        [*zip(*orders, strict=True)], partial(_collate, positions), _Distances(prepared, vectors),
        [one.ids for one in (*moved[:8], *kept[:8], *texts[:8])], training, {"warnings": list(prepared.adapter.warnings)},
        after=after,
    )  # fmt: skip


@dataclass(frozen=True)
class _Passage:
    """A prompt with the beginning of a reply, or a text."""

    ids: Row
    start: int
    """Where the reply begins; 0 of a text."""
    moved: bool


def _replies(loaded: LoadedModel, prompts: Sequence[str], events: Events) -> list[Row]:
    """What the base says to prompts without the concept: behind either prompt, its stream is to stay as it is."""
    with events.stage("let the base reply", len(prompts)) as stage:
        found = generate(loaded.model, loaded.tokenizer, prompts, REPLY, stage.advance)
    return [reply.ids for reply in found]


def _collate(positions: int, groups: Sequence[tuple[_Passage, ...]]) -> dict[str, Any]:
    """``moved`` marks the last positions of prompts that are moved, ``ends`` of those that are not, ``rest`` replies and texts."""
    passages = [one for kind in zip(*groups, strict=True) for one in kind]
    inputs = pad_right([one.ids for one in passages], torch.device("cpu"))
    place, real = torch.arange(inputs["input_ids"].shape[1]), inputs["attention_mask"].bool()
    start = torch.tensor([[one.start] for one in passages])
    moved = torch.tensor([[one.moved] for one in passages])
    end = (place < start) & (place >= start - positions)
    return {**inputs, "moved": end & moved, "ends": end & ~moved, "rest": real & (place >= start)}


class _Distances:
    """The loss: how far the stream is from where it should be, in distances between the classes, mean over places."""

    def __init__(self, prepared: LorraJob, vectors: Sequence[ReadingVector]):
        self.row, self.settings = prepared.adapter.job.row, prepared.settings
        self.vectors = {vector.subspace.place.layer + 1: vector for vector in vectors}

    def __call__(self, model: Any, batch: dict[str, Any]) -> Terms:
        device = next(model.parameters()).device
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        masks = {name: batch[name].to(device) for name in ("moved", "ends", "rest")}
        with torch.no_grad(), model.disable_adapter():
            frozen = read_streams(causal_model(model), self.row, inputs, list(self.vectors))
        own = read_streams(causal_model(model), self.row, inputs, list(self.vectors))
        terms: dict[str, list[Tensor]] = {name: [] for name in masks}
        for point, vector in self.vectors.items():
            still = frozen[point].float()
            targets = {"moved": still + self.settings.strength * vector.step.to(device), "ends": still, "rest": still}
            for name, mask in masks.items():
                terms[name].append(distance(own[point], targets[name], mask) / vector.gap)
        weights = {"moved": 1.0, "ends": self.settings.retain_weight, "rest": self.settings.retain_weight}
        return {name: weights[name] * torch.stack(values).mean() for name, values in terms.items()}


def _vectors(
    prepared: LorraJob, loaded: LoadedModel, positive: Sequence[Row], negative: Sequence[Row], advance: Any
) -> list[ReadingVector]:
    """From the last token of each prompt, place by place."""
    width = residual_width(prepared.adapter.job.checkpoint.config)
    pca = prepared.settings.reading == "pca"
    plus, minus, apart = (
        {place: Moments(width, covariance=covariance) for place in prepared.places}
        for covariance in (False, False, pca)
    )
    for start in range(0, len(positive), BATCH):
        some = slice(start, start + BATCH)
        ends = [
            _ends(loaded.model, prepared.adapter.job.row, rows[some], prepared.places) for rows in (positive, negative)
        ]
        for place in prepared.places:
            plus[place].update(ends[0][place])
            minus[place].update(ends[1][place])
            apart[place].update(ends[0][place] - ends[1][place])
        advance(len(positive[some]))
    if pca:
        return [by_components(plus[place], minus[place], apart[place], place) for place in prepared.places]
    return [by_means(plus[place], minus[place], place) for place in prepared.places]


@torch.no_grad()
def _ends(model: Any, row: Any, rows: Sequence[Row], places: Sequence[Place]) -> dict[Place, Tensor]:
    """The stream after some layers at the last token of each row [rows, d], fp32, on the CPU."""
    inputs = pad_right(rows, model.device)
    last = inputs["attention_mask"].sum(-1) - 1
    found = read_streams(model, row, inputs, [place.layer + 1 for place in places])
    return {place: found[place.layer + 1][torch.arange(len(rows)), last].float().cpu() for place in places}


def _along(
    model: Any, row: Any, places: Sequence[Place], vectors: Sequence[ReadingVector], positive: Sequence[Row],
    negative: Sequence[Row],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Where both classes lie along each vector on average: 0 where negative prompts lay, 1 where positive ones did."""
    found = {}
    ends = {
        name: _ends(model, row, rows[:BATCH], places) for name, rows in (("positive", positive), ("negative", negative))
    }
    for vector in vectors:
        place, axis = vector.subspace.place, vector.subspace.basis[:, 0]
        found[str(place)] = {
            name: float(((ends[name][place] - vector.subspace.offset) @ axis).mean()) / vector.gap for name in ends
        }
    return found
