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
from ..artifacts.reporting.sections import Section, Story, Table
from ..editing.architectures import layer_selection, residual_width
from ..editing.directions.reading_vector import ReadingVector, by_components, by_means, distance
from ..editing.directions.subspaces import Place
from ..editing.errors import RequestError
from ..editing.hooks.residual_stream import read_streams
from ..editing.modules import causal_model
from ..editing.numerics.moments import Moments
from ..eval.inference.generation import encode_prompt, generate
from ..eval.inference.likelihood import pad_right
from .common import adapter_job, adapter_run
from .common.adapter_job import AdapterJob, AdapterSettings
from .common.adapter_run import Training
from .common.examples import cycled
from .common.measured_run import Finished
from .common.story import LOW_RANK_LIMIT, tensors_changed, training_section
from .common.tokens import Row, end_positions
from .common.trainer import Terms

RECIPE = "lorra"
READ_PAIRS = 256
"""Contrast pairs that the vector is read from, at most."""
LAST = 64
"""First tokens of a text whose stream is to stay where it is."""
REPLY = 24
"""Tokens of a reply whose stream is to stay where it is."""
BATCH = 32


class LorraSettings(AdapterSettings):
    """Settings of representation tuning, low-rank (Zou et al. 2023, algorithm 1, unless another source is named)."""

    concept: str = "builtin:declining"
    """Concept pack with contrast pairs: builtin:NAME or a folder."""
    reading: Literal["mean", "pca"] = "mean"
    """Reading vector: difference of the two classes' means, or first principal component of pair differences (paper: pca)."""
    target_layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "0.25-0.625"
    """Layers whose output is moved, written as layers is. Later layers get no adapter (authors' code: 10, 12, ..., 20 of 32)."""
    strength: float = -1.0
    """How far to move, in distances between the two classes. Negative tunes away, positive toward (authors' code: 5)."""
    positions: int = Field(0, ge=0)
    """Tokens at the end of each prompt to move. 0 takes the chat template's closing tokens, or 3 of a plain text (authors' code: 64)."""
    moved: Literal["positive", "negative", "both"] = "positive"
    """Which prompts of the contrast pairs are moved. The others, replies and retain texts stay (paper: both)."""
    retain_weight: float = Field(1.0, ge=0)
    """Weight of each loss that holds prompts, replies and texts in place. Higher values change less elsewhere (paper: none)."""
    modules: Literal["all", "attention", "mlp"] = "attention"
    """Which linear modules of these layers get an adapter (authors' code: q_proj and v_proj)."""
    steps: int = Field(70, ge=1)
    """Number of optimizer steps (authors' logs: 70)."""
    batch_size: int = Field(16, ge=1)
    """Moved prompts a step, plus as many prompts and as many texts that stay (authors' code: 16)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW (authors' code: 3e-4, constant)."""


@dataclass(frozen=True)
class LorraJob:
    """A checked request."""

    adapter: AdapterJob
    settings: LorraSettings
    places: tuple[Place, ...]
    """Where the stream is moved."""


def prepare(settings: LorraSettings, *, resume: bool = False) -> LorraJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if not settings.strength:
        raise RequestError("strength=0 moves nothing; -1 tunes away by the distance between the classes, 1 toward")
    adapter = adapter_job.prepare(RECIPE, settings, resume=resume, needed=("contrast",))
    layers = sorted(layer_selection(settings.target_layers, adapter.run.layers))
    if min(adapter.layers) > layers[-1]:
        raise RequestError(
            f"layers={settings.layers} are all above layer {layers[-1]}, the last whose output is moved; adapt layers at or "
            "below it"
        )
    return LorraJob(adapter.up_to(layers[-1]), settings, tuple(Place(layer) for layer in layers))


def describe(job: LorraJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_job.describe(job.adapter, moved_at=[str(place) for place in job.places])


def run(job: LorraJob, events: Events) -> Finished:
    """Do the whole run: read the vectors, train, merge, measure, publish."""
    way = "toward" if job.settings.strength > 0 else "away from"
    return adapter_run.run(job.adapter, f"tuned {way} a reading vector", partial(_training, job), events)


def _training(job: LorraJob, loaded: LoadedModel, events: Events, work: Path) -> "LorraTraining":
    """Everything before the first gradient step."""
    settings, concept = job.settings, job.adapter.concept
    chat = concept.about.kind == "behaviour"
    pairs = random.Random(f"excise contrast {settings.seed}").sample(
        concept.contrast, k=min(READ_PAIRS, len(concept.contrast))
    )
    prompts = Prompts(
        [tuple(encode_prompt(loaded.tokenizer, pair.positive, chat=chat)) for pair in pairs],
        [tuple(encode_prompt(loaded.tokenizer, pair.negative, chat=chat)) for pair in pairs],
    )
    positions = end_positions(settings.positions, [*prompts.positive, *prompts.negative], chat)
    with events.stage("read the vectors", len(pairs)) as stage:
        vectors = _reading_vectors(job, loaded, prompts, stage.advance)
    provenance = {"model": job.adapter.run.source.describe(), "seed": settings.seed, "concept": concept.ref}
    save_directions([vector.subspace.with_provenance(provenance) for vector in vectors], work / FILE)
    replies = _replies(loaded, [pair.negative for pair in pairs], events) if chat else [()] * len(pairs)
    texts = [tuple(loaded.tokenizer(text.text)["input_ids"]) for text in concept.retain]
    passages = _passages(settings, prompts, replies, texts)
    long_texts = sum(len(row) > LAST for row in texts)
    return LorraTraining(job, loaded, vectors, prompts, passages, positions, long_texts)


@dataclass(frozen=True)
class Prompts:
    """Both members of each contrast pair."""

    positive: list[Row]
    negative: list[Row]


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
        self.vectors = {vector.subspace.place.layer + 1: vector for vector in vectors}
        count = settings.steps * settings.batch_size
        orders = [
            cycled(kind, count, random.Random(f"excise lorra {name} {settings.seed}"))
            for name, kind in passages.items()
            if kind
        ]
        self.rows = [*zip(*orders, strict=True)]
        self.checked_rows = [one.ids for kind in passages.values() for one in kind[:8]]
        self.along_base = self._along(loaded.model)

    def collate(self, rows: list[tuple[Passage, ...]]) -> dict[str, Any]:
        """``moved`` marks the last positions of prompts that are moved, ``ends`` of those that are not, ``rest`` replies and texts."""
        passages = [one for kind in zip(*rows, strict=True) for one in kind]
        inputs = pad_right([one.ids for one in passages], torch.device("cpu"))
        place, real = torch.arange(inputs["input_ids"].shape[1]), inputs["attention_mask"].bool()
        start = torch.tensor([[one.start] for one in passages])
        moved = torch.tensor([[one.moved] for one in passages])
        end = (place < start) & (place >= start - self.positions)
        return {**inputs, "moved": end & moved, "ends": end & ~moved, "rest": real & (place >= start)}

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """Algorithm 1: moved positions toward the base's stream plus the vector, all others toward the base's stream."""
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
            "data": f"{counts['moved']} prompts moved, {counts['kept']} prompts and {counts['texts']} texts kept, and replies{cut}",
            "lessons": counts,
        }
        lorra = {
            "reading": settings.reading,
            "strength": settings.strength,
            "moved": settings.moved,
            "positions": self.positions,
            "gaps": {str(vector.subspace.place): vector.gap for vector in self.vectors.values()},
            "pairs": len(self.prompts.positive),
            "along": {"base": self.along_base, "edited": self._along(causal_model(model))},
        }
        return {"training": training, "warnings": list(self.job.adapter.warnings), "lorra": lorra}

    def _along(self, model: Any) -> dict[str, dict[str, float]]:
        """Where both classes lie along each vector on average: 0 where negative prompts lay, 1 where positive ones did."""
        sides = {"positive": self.prompts.positive, "negative": self.prompts.negative}
        ends = {name: _ends(self.job, model, rows[:BATCH]) for name, rows in sides.items()}
        along = {}
        for vector in self.vectors.values():
            place, axis = vector.subspace.place, vector.subspace.basis[:, 0]
            along[str(place)] = {
                name: float(((ends[name][place] - vector.subspace.offset) @ axis).mean()) / vector.gap for name in ends
            }
        return along


def _reading_vectors(job: LorraJob, loaded: LoadedModel, prompts: Prompts, advance: Any) -> list[ReadingVector]:
    """From the last token of each prompt, place by place."""
    width, places, pca = residual_width(job.adapter.run.checkpoint.config), job.places, job.settings.reading == "pca"
    positive, negative, apart = (
        {place: Moments(width, covariance=covariance) for place in places} for covariance in (False, False, pca)
    )
    for start in range(0, len(prompts.positive), BATCH):
        chunk = slice(start, start + BATCH)
        plus, minus = (_ends(job, loaded.model, rows[chunk]) for rows in (prompts.positive, prompts.negative))
        for place in places:
            positive[place].update(plus[place])
            negative[place].update(minus[place])
            apart[place].update(plus[place] - minus[place])
        advance(len(prompts.positive[chunk]))
    if pca:
        return [by_components(positive[place], negative[place], apart[place], place) for place in places]
    return [by_means(positive[place], negative[place], place) for place in places]


@torch.no_grad()
def _ends(job: LorraJob, model: Any, rows: Sequence[Row]) -> dict[Place, Tensor]:
    """The stream after some layers at the last token of each row [rows, d], fp32, on the CPU."""
    inputs = pad_right(rows, model.device)
    last = inputs["attention_mask"].sum(-1) - 1
    streams = read_streams(model, job.adapter.run.row, inputs, [place.layer + 1 for place in job.places])
    return {place: streams[place.layer + 1][torch.arange(len(rows)), last].float().cpu() for place in job.places}


def story(results: dict[str, Any]) -> Story:
    """What representation tuning says of its runs, from everything else that ``eval.json`` holds."""
    lorra, edited = results["lorra"], results["edited"]
    headline = (
        f"**What was edited.** `{results['base']['name']}` was {edited['how']} of *{results['concept']['description']}*: a "
        f"low-rank update moves its stream by {lorra['strength']} times the distance between {lorra['pairs']} pairs of prompts "
        f"with and without it ({tensors_changed(results)}; rank {edited['rank']}, {edited['about']})."
    )
    rows = tuple(
        (
            place,
            *(
                f"{lorra['along'][model][place][side]:.2f}"
                for side in ("positive", "negative")
                for model in ("base", "edited")
            ),
        )
        for place in lorra["along"]["base"]
    )
    about = (
        "0 is where prompts without the concept lay in the base, 1 where those with it did (means of at most "
        f"{BATCH} prompts each)."
    )
    headers = ("place", "with it: base", "with it: edited", "without it: base", "without it: edited")
    along = Section("Where prompts lie along the vector", (about,), (Table(headers, rows),))
    return Story(headline, limits=(LOW_RANK_LIMIT,), sections=(training_section(results), along))
