"""What a run will hold in memory, stage by stage, before a weight is read; and how much of a step fits at once.

Each recipe says its stages in a function ``memory`` beside its ``describe``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ...artifacts.checkpoints.read import Checkpoint
from ...artifacts.models.load import load_tokenizer
from ...artifacts.models.memory import free_memory
from ...artifacts.models.source import ModelSource
from ...artifacts.reporting.terminal import aligned
from ...editing.architectures import layer_count, residual_width
from ...eval.concept import Concept
from ...eval.inference.encoding import encode
from ...eval.inference.kept import BYTES as BASELINE_BYTES
from ...eval.inference.likelihood import Request, tokens_of_batch
from ...eval.inference.lockstep import tokens_of_replies
from ...eval.items import held_out_texts
from ...eval.measurements import multiple_choice
from ...eval.model_under_test import TEXT_TOKENS, EvalSettings
from .adapter_job import AdapterJob, products_of
from .measured_memory import MOST_READ, measured_texts, requests_of, scored_at_once, scored_bytes, tokens_about
from .measured_run import Job
from .memory_sizes import STATE_BYTES, Gradients, ModelSizes, Rows, Unplanned, sizes_of
from .whole_weights import MOMENT_BYTES

SPARE = 0.9
"""Share of free memory that is planned with: allocators round up, and leave gaps."""
TEMPLATE_TOKENS = 32
"""Tokens that a chat template adds to a prompt, about."""
LONGEST_LOOKED_AT = 4
"""Texts of a file whose tokens are counted: those of the most characters."""
TRIVIAL = 200
"""Numbers that one token leaves in each layer, for each of the stream's width, at most: no model comes near it."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one stage holds at its peak."""

    name: str
    weights: int
    """Of the model, and copies of them that the stage makes."""
    trained: int = 0
    """What is trained, in fp32, with its gradient and the optimizer's state."""
    work: int = 0
    """Activations, logits and other tensors of one forward or step."""
    kept: int = 0
    """What stays from batch to batch: the base's distributions, keys and values, targets."""

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.work + self.kept


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a run on one device."""

    device: str
    free: int
    """Bytes that are free on the device now."""
    stages: tuple[StageMemory, ...]

    @property
    def peak(self) -> StageMemory:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.total)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, in bytes."""
        stages = [{**asdict(stage), "total": stage.total} for stage in self.stages]
        return {"device": self.device, "free": self.free, "peak": self.peak.name, "stages": stages}


def in_words(plan: dict[str, Any], width: int | None) -> str:
    """A plan as ``as_json`` gives it, as a table in GB, and whether it fits."""
    columns = ("weights", "trained", "work", "kept", "total")
    rows = [[stage["name"], *(f"{stage[column] / 1e9:.2f}" for column in columns)] for stage in plan["stages"]]
    peak = max(plan["stages"], key=lambda stage: stage["total"])
    table = aligned(["memory in GB", *columns], rows, width)
    return f"{table}\n{verdict(peak['name'], peak['total'], plan['free'], plan['device'])}"


def verdict(name: str, total: int, free: int, device: str) -> str:
    """Whether the peak fits, and by how much it does not."""
    told = f"peak: {total / 1e9:.2f} GB in '{name}'; {free / 1e9:.2f} GB are free on {device}"
    if total <= free:
        return told
    return f"{told}: {(total - free) / 1e9:.2f} GB are missing"


class RunMemory:
    """What stages are made of: the sizes of a run's model, and how long its texts are."""

    def __init__(
        self,
        source: ModelSource,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        concept: Concept,
        measured: EvalSettings | None = None,
    ):
        """Args:
        measured: How much is measured of base and edited model; None measures no divergence from the base.
        """
        self.source, self.checkpoint, self.device, self.concept = source, checkpoint, device, concept
        self.measured = measured
        self.sizes = sizes_of(checkpoint.config, dtype)

    @classmethod
    def of(cls, run: Job) -> "RunMemory":
        """Of a run that measures base and edited model."""
        return cls(run.source, run.checkpoint, run.device, run.dtype, run.concept, run.settings.measuring())

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source, None if self.measured is None else self.measured.prompts)

    def tokens(self, texts: Sequence[str]) -> int:
        """Tokens of some texts, estimated from a few of them."""
        few = texts[:: max(1, len(texts) // 32)]
        read = sum(len(encode(self.tokenizer, text)) for text in few)
        return read * sum(map(len, texts)) // max(1, sum(map(len, few)))

    def longest(self, texts: Iterable[str], most: int) -> int:
        """Tokens of the longest of some texts, at most ``most``."""
        few = sorted(texts, key=len)[-LONGEST_LOOKED_AT:]
        # What lies beyond is not read, however long the text is.
        return min(most, max((len(encode(self.tokenizer, text[: 16 * most])) for text in few), default=1) + 1)

    def tokenizes(self, texts: Iterable[str] = ()) -> bool:
        """Whether the pack, and some texts beside it, are so few that a plan reads them as the recipe will; of others
        every row is taken to be as long as the longest."""
        return sum(map(len, measured_texts(self.concept))) + sum(map(len, texts)) <= MOST_READ

    @property
    def context(self) -> int:
        """Tokens that the model reads at once, at most."""
        config = self.sizes.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 20)

    @property
    def text_limit(self) -> int:
        """Tokens of a text that recipes read at once."""
        return min(self.context, 1024) // 2

    @property
    def weights(self) -> int:
        return self.sizes.weights()

    @property
    def room(self) -> int:
        """Bytes that are planned with."""
        return int(SPARE * free_memory(self.device))

    def plan(self, stages: Sequence[StageMemory]) -> MemoryPlan:
        """The stages of the recipe between loading and measuring, which every run does."""
        # Pages of the files that are read count for a processor's memory until they are needed otherwise.
        pages = self.checkpoint.size if self.device.type == "cpu" else 0
        load = StageMemory("load", self.weights, work=pages)
        return MemoryPlan(str(self.device), free_memory(self.device), (load, *stages))

    def measured_run(self, stages: Sequence[StageMemory], edit: int = 0) -> MemoryPlan:
        """The same of a run that measures base and edited model before and after these stages.

        Args:
            edit: Bytes of the edit, which stays in main memory until all is published.
        """
        edited = self.measuring("measure the edited")
        if self.device.type == "cpu":
            edited = replace(edited, kept=edited.kept + edit)
        return self.plan((self.measuring_base(), *stages, edited))

    def edit_of(self, job: AdapterJob) -> int:
        """Bytes of what a job learns; an adapter is small beside all else."""
        return 4 * self.trained_weights(job) if job.whole else 0

    def trained_weights(self, job: AdapterJob) -> int:
        """Numbers of the weights that a job trains themselves."""
        return sum(self.sizes.model.get_parameter(name).numel() for name in job.shape.weights)

    def measuring(self, name: str) -> StageMemory:
        """Every measurement of the table on one model, which is compared with its base."""
        # The base's distribution of a text, the model's, and their divergence's terms.
        compared = self._logits_of_texts + 4 * 4 * self._longest_text * self.sizes.vocabulary if self.baseline else 0
        return StageMemory(name, self.weights, work=max(self._measured, compared), kept=self.baseline)

    def measuring_base(self) -> StageMemory:
        """The same of the base, whose distributions are read once all else is measured."""
        name = "measure the base"
        itemsize = self.sizes.dtype.itemsize
        made = self._logits_of_texts + (4 * self._longest_text * self.sizes.vocabulary if itemsize < 4 else 0)
        scored = StageMemory(name, self.weights, work=self._measured)
        read = StageMemory(name, self.weights, work=made if self.baseline else 0, kept=self.baseline)
        return max(scored, read, key=lambda stage: stage.total)

    @cached_property
    def _measured(self) -> int:
        """What the measurements take that compare with nothing."""
        longest = self.longest(measured_texts(self.concept), min(self.context, 2048))
        read = max(longest, tokens_of_batch(self.sizes.vocabulary, self.device))
        read = min(read, max(longest, tokens_about(self.concept)))
        scored = self._of_scored(self.scored(read))
        prompts = self.longest((prompt.prompt for prompt in self.concept.prompts), longest)
        reply = self.measured.max_new_tokens if self.measured else 0
        most = max(len(self.concept.prompts), len(self.concept.questions))
        replies = self.replies(prompts + TEMPLATE_TOKENS + reply, most)
        return max(scored, self.sizes.forward(Rows(max(1, read // longest), longest)), replies)

    def replies(self, length: int, most: int) -> int:
        """Bytes beside the weights while replies are made.

        Args:
            length: Tokens of the longest prompt with its reply.
            most: Replies to be made.
        """
        together = tokens_of_replies(self.sizes.model, self.device) // length
        return self.sizes.forward(Rows(max(1, min(together, most)), length), cached=True)

    def asking(self, name: str) -> StageMemory:
        """Multiple choice alone."""
        asked = [] if self.measured is None else multiple_choice.requests(self.concept, self.measured)
        return StageMemory(name, self.weights, work=self.scoring(asked), kept=self.baseline)

    def scoring(self, asked: Sequence[Request]) -> int:
        """Bytes beside the weights while some texts are scored."""
        return self._of_scored(self.scored(tokens_of_batch(self.sizes.vocabulary, self.device), asked))

    def _of_scored(self, batches: Sequence[tuple[int, int, int]]) -> int:
        vocabulary, itemsize = self.sizes.vocabulary, self.sizes.dtype.itemsize
        return max(scored_bytes(*counts, vocabulary, itemsize) for counts in batches)

    def scored(self, full: int, asked: Sequence[Request] | None = None) -> list[tuple[int, int, int]]:
        """Positions of which a batch computes logits, those that are scored, and for how many continuations; batches are
        full where texts are not read.

        Args:
            full: Tokens of a full batch.
            asked: What is scored; by default all that the measurements score.
        """
        if asked is None:
            asked = [] if self.measured is None else requests_of(self.concept, self.measured)
        budget = tokens_of_batch(self.sizes.vocabulary, self.device)
        counts = scored_at_once(asked, self.tokenizer, self.context, budget) if asked else None
        return counts or [(full, full, full)]

    @cached_property
    def _longest_text(self) -> int:
        """Tokens of the longest text along which distributions are compared."""
        return self.longest((text.text for text in held_out_texts(self.concept)), TEXT_TOKENS)

    @property
    def _logits_of_texts(self) -> int:
        """Logits of as many of these texts as are read at once."""
        length = self._longest_text
        rows = max(1, tokens_of_batch(self.sizes.vocabulary, self.device) // length)
        rows = min(rows, max(1, len(self.concept.retain)), self.measured.kl_prompts if self.measured else 1)
        return rows * length * self.sizes.vocabulary * self.sizes.dtype.itemsize

    @cached_property
    def baseline(self) -> int:
        """The base's distributions along replies and texts, which stay until the edited model is measured."""
        settings, concept = self.measured, self.concept
        # They lie in main memory, whatever the device.
        if settings is None or self.device.type != "cpu":
            return 0
        a_token = 4 * self.sizes.vocabulary
        texts = min(settings.kl_prompts, len(held_out_texts(concept)))
        neutral = sum(prompt.split == "neutral" for prompt in concept.prompts) or 64
        of_replies = min(settings.kl_prompts, neutral) * settings.max_new_tokens * a_token
        return min(BASELINE_BYTES, of_replies) + min(BASELINE_BYTES, texts * (self._longest_text - 1) * a_token)

    def reading(self, name: str, rows: Rows, *, points: int = 0, kept: int = 0, cached: bool = False) -> StageMemory:
        """Forwards without gradients.

        Args:
            points: Points of the stream that are held of a batch.
            kept: Bytes that stay behind.
        """
        held = points * rows.tokens * self.sizes.width * self.sizes.dtype.itemsize
        work = self.sizes.forward(rows, cached=cached) + held
        return StageMemory(name, self.weights, work=work, kept=kept + self.baseline)

    def training(
        self, job: AdapterJob, rows: Rows, *, kept: int = 0, work: int = 0, deepest: int | None = None
    ) -> StageMemory:
        """Gradient steps on an adapter, or on whole weights.

        Args:
            rows: What a step reads, in all its parts.
            kept: Bytes of targets and the like.
            work: Bytes that a step holds beside forward and backward.
            deepest: The last layer that is computed.
        """
        settings, sizes = job.settings, self.sizes
        gradients = gradients_of(job, deepest)
        weights, trained = self.weights if job.base_bits == 16 else sizes.weights(job.base_bits), 0
        if job.whole:
            numbers = self.trained_weights(job)
            # All parameters are in fp32 while they train, and what they were stands beside them.
            weights = weights * 4 // sizes.dtype.itemsize
            # Beside the weights: the gradient, the moments, and what the weights were.
            trained = int((4 + MOMENT_BYTES[job.optimizer] + sizes.dtype.itemsize) * numbers)
        else:
            trained = STATE_BYTES * sizes.adapter(job.shape)
        asked = Rows(-(-rows.count // settings.gradient_accumulation_steps), rows.length)
        beside = work + (0 if deepest is not None else sizes.head(self.device))
        if gradients.products is not None:
            # The unembedding, in the type that products are computed in.
            beside += gradients.products.itemsize * sizes.vocabulary * sizes.width
        room = self.room - weights - trained - kept - self.baseline - beside
        fitting = fit_step(sizes, gradients, asked, room, checkpointing=settings.gradient_checkpointing)
        name = f"train{fitting.in_words()}"
        held = fitting.size
        if job.whole and fitting.parts == settings.gradient_accumulation_steps == 1:
            # Gradients are made as activations go, and are gone before the next step's are there.
            held = max(0, held - 4 * self.trained_weights(job))
        return StageMemory(name, weights, trained, held + beside, kept + self.baseline)


@dataclass(frozen=True)
class FittingStep:
    """How a step is computed so that it fits, and the bytes of its largest part."""

    parts: int
    checkpointing: bool
    size: int
    asked: bool = False
    """Whether checkpointing is what the settings ask for."""

    def in_words(self) -> str:
        """In brackets what differs from the settings."""
        told = [f"in {self.parts} parts"] if self.parts > 1 else []
        told += ["checkpointed"] if self.checkpointing else []
        return f" ({', '.join(told)})" if told else ""


def fit_step(
    sizes: ModelSizes, gradients: Gradients, rows: Rows, room: int, *, checkpointing: bool = False, unit: int = 1
) -> FittingStep:
    """The fewest parts of a step in which it fits into ``room`` bytes; with activations computed again if one row is
    too much.

    Args:
        unit: Rows that must stay together.
    """
    for again in (checkpointing, True):
        whole = sizes.step(rows, gradients, checkpointing=again)
        if whole <= room:
            return FittingStep(1, again, whole)
        least = sizes.step(Rows(unit, rows.length), gradients, checkpointing=again) if rows.count > unit else whole
        if least <= room or again:
            break
    many = max(1, rows.count // unit)
    a_unit = max(1.0, (whole - least) / max(1, many - 1))
    units = max(1, min(many, 1 + int((room - least) / a_unit)))
    return FittingStep(-(-many // units), again, int(least + (units - 1) * a_unit))


def gradients_of(job: AdapterJob, deepest: int | None = None) -> Gradients:
    """What a job trains."""
    return Gradients(job.shape, whole=job.whole, deepest=deepest, products=products_of(job))


def rows_at_once(config: dict[str, Any], dtype: torch.dtype, device: torch.device, rows: Rows) -> int:
    """Rows of a forward and backward through a frozen model that fit into what is free now; at most what is asked."""
    room = int(SPARE * free_memory(device))
    if surely_fits(config, rows.tokens, dtype.itemsize, room):
        return rows.count
    try:
        sizes = sizes_of(config, dtype)
        step = fit_step(sizes, Gradients(), rows, room - sizes.head(device))
    except Unplanned:
        return rows.count
    return -(-rows.count // step.parts)


def surely_fits(config: dict[str, Any], tokens: int, itemsize: int, room: int) -> bool:
    """Whether a step of so many tokens is so small that nothing need be planned."""
    return tokens * layer_count(config) * residual_width(config) * max(itemsize, 4) * TRIVIAL < room


def step_in_parts(job: AdapterJob, rows: Rows, deepest: int | None = None) -> FittingStep | None:
    """How a step is to be computed with what is free now, with the model loaded; None where it fits as it is."""
    run, settings = job.run, job.settings
    asked = Rows(-(-rows.count // settings.gradient_accumulation_steps), rows.length)
    room = int(SPARE * free_memory(run.device))
    if job.whole or surely_fits(run.checkpoint.config, asked.tokens, run.dtype.itemsize, room):
        return None
    try:
        sizes = sizes_of(run.checkpoint.config, run.dtype)
        room -= STATE_BYTES * sizes.adapter(job.shape) + sizes.head(run.device)
        return fit_step(sizes, gradients_of(job, deepest), asked, room, checkpointing=settings.gradient_checkpointing)
    except Unplanned:
        # Memory that runs out halves the step all the same.
        return None


def tokens_at_once(job: AdapterJob, most: int) -> int:
    """Tokens of a forward with gradients that fit into what is free now, with the model loaded; at most ``most``."""
    run, settings = job.run, job.settings
    room = int(SPARE * free_memory(run.device))
    if surely_fits(run.checkpoint.config, most, run.dtype.itemsize, room):
        return most
    rows = Rows(4, 256)
    try:
        sizes = sizes_of(run.checkpoint.config, run.dtype)
        a_token = sizes.step(rows, gradients_of(job), checkpointing=settings.gradient_checkpointing) / rows.tokens
    except Unplanned:
        return most
    # The gradients of all parts are summed beside those of the trainer.
    room -= (STATE_BYTES + 4) * sizes.adapter(job.shape) + sizes.head(run.device)
    return max(1, min(most, int(room / a_token)))
