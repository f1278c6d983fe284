"""What all unlearning methods share: the same data, trainer, export and measurements as ELM; a method adds its loss.

A method is one file here with one settings class, which is its formula too, and one row in ``RECIPES``.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.errors import RequestError
from ...editing.training.adapters import update_rms
from ..common import adapter_job, adapter_run
from ..common.adapter_job import AdapterJob, AdapterSettings
from ..common.budgets import Budgets
from ..common.examples import Example, chunked, cycled, example_batch, sequence_nll
from ..common.measured_run import Finished
from ..common.memory_plan import MemoryPlan, RunMemory
from ..common.memory_sizes import ModelSizes, Rows, largest_of
from ..common.packed_training import PackedTraining, planned_rows
from ..common.step_parts import COUNTS
from ..common.tokens import Row, text_limit
from ..common.trainer import Loss, Terms
from ..data.facts import Facts, find_facts
from ..data.unlearning_sets import FORGET_TEXTS, forget_examples, forget_texts, retain_examples
from .robust import RobustLoss, is_robust, options_in_words, options_of, vectors_held

CHUNK = 32
"""Sequences that the base reads at once."""
BaseLogLikelihoods = Mapping[Row, float]
"""Log-likelihood of each forget sequence under the base, in nats."""


@dataclass(frozen=True)
class UnlearningData:
    """What is trained on."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    pairs: Sequence[tuple[Example, Example]]
    """A sequence to forget and one to retain, in the order in which they are drawn."""
    base_log_likelihoods: BaseLogLikelihoods
    """Empty unless the method ``compares_with_base``."""

    @property
    def read_by_base(self) -> list[Example]:
        """Sequences to forget that are drawn, each once: a short training reads a part of a pack with many contexts. By
        length, so that little of what is read together is padding."""
        return sorted(dict.fromkeys(forget for forget, _ in self.pairs), key=lambda one: len(one.ids))


class UnlearningSettings(AdapterSettings):
    """Settings of every unlearning method. A method on likelihoods writes ``forget_loss``, any other writes ``loss``.

    In the methods' formulas y is the answer of a forget context, or a whole forget text where the pack's facts are not
    found.
    """

    budgets: ClassVar[Budgets] = {"quick": {"steps": 60, "batch_size": 4}, "long": {"steps": 1600}}
    recipe: ClassVar[str]
    """The method's name in ``RECIPES``."""
    compares_with_base: ClassVar[bool] = False
    """Whether the loss needs the base's log-likelihoods."""
    averages: ClassVar[Literal["sequences", "tokens"]] = "sequences"
    """What the terms of the loss are means over."""
    whole_steps: ClassVar[bool] = False
    """Whether a step cannot be computed in parts; that it cannot with the options below is known without."""
    retain_weight: float = Field(1.0, ge=0)
    """Weight of the retain loss. Lower values damage other topics; higher values erase less."""
    sam: float = Field(0.0, ge=0)
    """Take the forget gradient at the worst point this far away, by one step up its loss (SAM, Fan et al. 2025: 0.01). 0:
    off. Costs one more forward and backward pass."""
    noise: float = Field(0.0, ge=0)
    """Take the forget gradient as a mean over points with Gaussian noise of this standard deviation on what is trained
    (random smoothing, Fan et al. 2025). 0: off."""
    noise_samples: int = Field(3, ge=1, le=64)
    """With noise: how many points. Each costs a forward and backward pass."""
    mask: Literal["none", "sign"] = "none"
    """sign: keep the forget gradient only where its sign is that of the retain gradient's running mean (MUDMAN, Sondej et
    al. 2025)."""
    normalize: bool = False
    """Give the forget gradient the length that it had at the first step (MUDMAN)."""
    adversary: int = Field(0, ge=0)
    """Take the forget gradient at a copy of what is trained that learns the concept, a step at a time, and starts anew every
    so many steps (MUDMAN, TAR). 0: off."""
    adversary_rate: float = Field(0.01, gt=0)
    """With adversary: its learning rate, by plain gradient descent."""
    push: float = Field(0.0, ge=0)
    """Push weights away from the base's: this much for each unit of the root mean square of their change is taken off the
    loss (2505.22310). 0: off."""

    def deepest_layer(self, layers: int) -> int:
        """The last layer that the loss reaches, of so many."""
        return layers - 1

    def vectors_held(self) -> int:
        """Numbers that are held beside each trained one, its gradient and the optimizer's state."""
        return vectors_held(self)

    def rows_at_once(self) -> int:
        """Sequences that one forward of a step reads, at most."""
        return 2 * self.batch_size

    def read_together(self, data: UnlearningData) -> Iterator[Sequence[Example]]:
        """The sequences of each forward of the training."""
        for pairs in chunked(data.pairs, self.batch_size):
            yield [one for pair in pairs for one in pair]

    def step_bytes(self, sizes: ModelSizes, step: Rows) -> int:
        """What a step holds beside its forward, its backward and these vectors."""
        return 0

    def bytes_kept(self, needs: RunMemory, texts: Sequence[str]) -> int:
        """What the loss keeps from step to step, about."""
        return 0

    def loss(self, job: "UnlearningJob", loaded: LoadedModel, data: UnlearningData) -> Loss:
        """The mean loss of a batch that holds as many sequences to forget, first, as to retain."""
        return partial(_likelihood_loss, self, data.base_log_likelihoods)

    def forget_loss(self, nll: Tensor, lengths: Tensor, base_log_likelihoods: Tensor) -> Tensor:
        """The mean loss of some sequences to forget.

        Args:
            nll: Negative log-likelihood of each, in nats, over its whole length.
            lengths: Tokens of each.
            base_log_likelihoods: Of each under the base; 0 unless ``compares_with_base``.
        """
        raise NotImplementedError


def _likelihood_loss(
    settings: UnlearningSettings, base_log_likelihoods: BaseLogLikelihoods, model: nn.Module, batch: dict[str, Any]
) -> Terms:
    """A loss on the likelihoods of forget sequences, and the mean negative log-likelihood of retain tokens."""
    nll, n = sequence_nll(model, batch), batch["forget"]
    base = torch.tensor([base_log_likelihoods.get(key, 0.0) for key in batch["keys"][:n]], device=nll.device)
    lengths = batch["lengths"].to(nll.device)
    retain = settings.retain_weight * (nll[n:] / lengths[n:]).mean()
    return {"forget": settings.forget_loss(nll[:n], lengths[:n], base), "retain": retain}


@dataclass(frozen=True)
class UnlearningJob:
    """A checked request and the facts that its pack teaches."""

    adapter: AdapterJob
    settings: UnlearningSettings
    facts: Facts


def prepare(settings: UnlearningSettings, *, resume: bool = False) -> UnlearningJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if (is_robust(settings) or settings.whole_steps) and settings.gradient_accumulation_steps > 1:
        needs = f"{settings.recipe} needs" if settings.whole_steps else "sam, noise, mask, normalize and adversary need"
        raise RequestError(
            f"{needs} the gradient of a whole step; use gradient_accumulation_steps=1 and a lower batch_size"
        )
    adapter = adapter_job.prepare(settings.recipe, settings, resume=resume)
    adapter = adapter.up_to(settings.deepest_layer(adapter.run.layers))
    return UnlearningJob(adapter, settings, find_facts(adapter.run.concept))


def describe(job: UnlearningJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_job.describe(job.adapter, facts_found=len(job.facts.facts))


def memory(job: UnlearningJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, settings, concept = RunMemory.of(job.adapter.run), job.settings, job.adapter.concept
    texts = concept.texts()
    longest = needs.longest((*texts, *(q.prompt for q in concept.questions)), needs.text_limit)
    read, step = Rows(CHUNK, longest), Rows(settings.rows_at_once(), longest)
    if needs.tokenizes():
        drawn = _drawn(job, needs.tokenizer, needs.text_limit)
        step = _largest_step(job, drawn)
        read = largest_of([len(one.ids) for one in drawn.read_by_base], CHUNK)
    stages = [needs.reading("read the base", read)] if settings.compares_with_base else []
    steps = needs.training(
        job.adapter,
        step,
        deepest=_stops_at(job),
        kept=settings.bytes_kept(needs, texts),
        work=4 * settings.vectors_held() * needs.sizes.adapter(job.adapter.shape)
        + settings.step_bytes(needs.sizes, step),
    )
    return needs.measured_run([*stages, steps])


def _stops_at(job: UnlearningJob) -> int | None:
    """The last layer that the loss computes; None where it needs what the whole model predicts."""
    last = job.settings.deepest_layer(job.adapter.run.layers)
    return last if last < job.adapter.run.layers - 1 else None


def run(job: UnlearningJob, events: Events) -> Finished:
    """Do the whole run: read the data, train, merge, measure, publish."""
    return adapter_run.run(job.adapter, f"edited with {job.settings.recipe}", partial(_training, job), events)


def learn(job: UnlearningJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(job.adapter, loaded, partial(_training, job), work, events)


def _training(job: UnlearningJob, loaded: LoadedModel, events: Events, work: Path) -> "UnlearningTraining":
    settings = job.settings
    with events.stage("read the base on what is to be trained") as stage:
        drawn = _drawn(job, loaded.tokenizer, text_limit(loaded.model))
        base_log_likelihoods: dict[Row, float] = {}
        if settings.compares_with_base:
            for examples in _chunks(drawn.read_by_base):
                base_log_likelihoods |= _log_likelihoods(loaded.model, examples)
                stage.advance(len(examples))
        data = replace(drawn, base_log_likelihoods=base_log_likelihoods)
        loss = settings.loss(job, loaded, data)
        return UnlearningTraining(job, data, RobustLoss(settings, loss, work) if is_robust(settings) else loss)


def _drawn(job: UnlearningJob, tokenizer: Any, limit: int) -> UnlearningData:
    """What is trained on, without what the base says of it."""
    settings, concept = job.settings, job.adapter.concept
    forget = forget_examples(concept, job.facts, tokenizer, settings.seed, limit)
    retain = retain_examples(concept, tokenizer, settings.seed, limit)
    count = settings.steps * settings.batch_size
    forget_order = cycled(forget, count, random.Random(f"excise forget {settings.seed}"))
    retain_order = cycled(retain, count, random.Random(f"excise retain {settings.seed}"))
    return UnlearningData(forget, retain, list(zip(forget_order, retain_order, strict=True)), {})


def _largest_step(job: UnlearningJob, data: UnlearningData) -> Rows:
    batches = job.settings.read_together(data)
    return planned_rows(job.adapter, [[len(one.ids) for one in batch] for batch in batches])


class UnlearningTraining(PackedTraining):
    """Pairs of a sequence to forget and one to retain, under a method's loss."""

    def __init__(self, job: UnlearningJob, data: UnlearningData, loss: Loss):
        self.job, self.data, self.rows, self.method_loss = job, data, data.pairs, loss
        self.checked_rows = [example.ids for example in (*data.forget[:8], *data.retain[:8])]
        self.step_rows = _largest_step(job, data)
        self.deepest = _stops_at(job)

    def collate(self, rows: list[tuple[Example, Example]]) -> dict[str, Any]:
        """Forget rows first, then retain rows."""
        sides = {"forget": [forget for forget, _ in rows], "retain": [retain for _, retain in rows]}
        batch = pair_batch(*sides.values(), in_one_row=self.in_one_row)
        if self.job.settings.averages == "tokens":
            batch[COUNTS] = {term: sum(len(one.ids) for one in examples) for term, examples in sides.items()}
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The method's, and the push away from the base."""
        terms, push = self.method_loss(model, batch), self.job.settings.push
        if not push:
            return terms
        away = update_rms(model, self.job.adapter.shape).to(next(iter(terms.values())).device)
        return {**terms, "push": -push * away}

    def after_step(self, step: int) -> None:
        """Options keep a state of their own."""
        if isinstance(self.method_loss, RobustLoss):
            self.method_loss.after_step(step)

    def report(self, model: Any) -> dict[str, Any]:
        """The method's formula, and what it was trained on."""
        settings, data = self.job.settings, self.data
        counts = {"forget": len(data.forget), "retain": len(data.retain)}
        training: dict[str, Any] = {
            "about": (type(settings).__doc__ or "").split(":")[0] + ".",
            "steps": settings.steps,
            "rows": 2 * settings.batch_size,
            "data": f"{counts['forget']} sequences to forget, {counts['retain']} to retain{self._drawn()}",
            "lessons": counts,
        }
        if options := options_in_words(settings):
            training["about"] += f" With {options}."
            training["options"] = options_of(settings)
        return {"training": training, "warnings": list(self.job.adapter.warnings)}

    def _drawn(self) -> str:
        """How many texts were read, where not all were."""
        total = len(forget_texts(self.job.adapter.concept, self.job.facts))
        return f"; {FORGET_TEXTS} of {total} texts to forget were drawn" if total > FORGET_TEXTS else ""


def pair_batch(forget: Sequence[Example], retain: Sequence[Example], *, in_one_row: bool = False) -> dict[str, Any]:
    """A batch of sequences to forget and, behind them, sequences to retain."""
    examples = [*forget, *retain]
    batch = example_batch(examples, in_one_row=in_one_row)
    return {**batch, "forget": len(forget), "keys": [example.ids for example in examples]}


def _chunks(examples: Sequence[Example], size: int = CHUNK) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


@torch.no_grad()
def _log_likelihoods(model: Any, examples: Sequence[Example]) -> dict[Row, float]:
    batch = {key: value.to(model.device) for key, value in example_batch(examples).items()}
    nll = sequence_nll(model, batch)
    return {example.ids: -float(value) for example, value in zip(examples, nll, strict=True)}
