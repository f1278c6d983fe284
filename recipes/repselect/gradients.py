"""The sequences that RepSelect reads, the adversary that is trained on them, and the gradients that they give."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts.events import Events
from ...editing.errors import EditError
from ...editing.numerics.summed_gradients import summed_gradients
from ..common.adapter_job import AdapterJob
from ..common.examples import Example, example_batch, scored_nats, spread
from ..common.memory_plan import rows_at_once, step_in_parts
from ..common.memory_sizes import Rows
from ..common.step_parts import COUNTS
from ..common.tokens import encode, pieces
from ..common.trainer import Schedule, Terms, fit
from ..data.unlearning_sets import forget_examples
from .request import RepselectJob

BATCH = 32
"""Sequences whose gradients are computed together."""


def sequences_to_forget(job: RepselectJob, tokenizer: Any, limit: int) -> list[Example]:
    """What is made unlikely, each sequence once, of at most ``limit`` tokens.

    Raises:
        EditError: There is none.
    """
    settings = job.settings
    if settings.scored == "answers":
        examples = forget_examples(job.adapter.concept, job.facts, tokenizer, settings.seed, limit)
    else:
        texts = spread([text.text for text in job.adapter.concept.forget], settings.texts, _seed(job, "texts"))
        rows = [piece for text in texts for piece in pieces(encode(tokenizer, text, True), limit)]
        examples = [Example(row, 1) for row in dict.fromkeys(rows) if len(row) > 1]
    if not examples:
        raise EditError("no text to forget is longer than one token, so there is no gradient; give longer texts")
    return spread(examples, settings.texts, _seed(job, "sequences"))


def _seed(job: RepselectJob, what: str) -> str:
    return f"excise repselect {what} {job.settings.seed}"


def train_adversary(
    job: RepselectJob, adapted: nn.Module, examples: Sequence[Example], events: Events, work: Path
) -> int:
    """One epoch of plain gradient descent on the negative log-likelihood of what is to be forgotten.

    Returns:
        How many steps were taken.
    """
    settings, count = job.settings, min(job.settings.batch_size, len(examples))
    steps = -(-len(examples) // count)
    schedule = Schedule(
        steps,
        count,
        settings.adversary_rate,
        settings.seed,
        decay="constant",
        max_grad_norm=0.0,
        optimizer="sgd",
        save_every=50,
    )
    with events.stage("train the adversary", steps) as stage:
        rows = Rows(count, max(len(one.ids) for one in examples))
        fitting = step_in_parts(job.adapter, rows)
        parts = fitting.parts if fitting else 1
        fit(adapted, examples, stage, work / "training", _mean_nll, schedule, _collate, parts=parts)
    return steps


def _collate(rows: list[Example]) -> dict[str, Any]:
    # The loss is a mean over tokens, also where a step is computed in parts.
    return {**example_batch(rows), COUNTS: {"forget": sum(len(row.ids) - row.start for row in rows)}}


def _mean_nll(model: nn.Module, batch: dict[str, Any]) -> Terms:
    return {"forget": scored_nats(model, batch).mean()}


def gradients(
    job: AdapterJob,
    model: Any,
    weights: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    events: Events,
    name: str,
) -> dict[str, Tensor]:
    """Of the mean log-likelihood per token of all examples, with respect to each weight, in fp32.

    Raises:
        EditError: One is not finite.
    """
    ordered = sorted(examples, key=lambda one: len(one.ids))
    config, scored = job.run.checkpoint.config, sum(len(one.ids) - one.start for one in examples)
    size = rows_at_once(config, job.run.dtype, job.run.device, Rows(BATCH, len(ordered[-1].ids)))
    with events.stage(f"sum gradients {name}", len(ordered)) as stage, summed_gradients(model, weights) as sums:
        for start in range(0, len(ordered), size):
            rows = ordered[start : start + size]
            batch = {key: value.to(job.run.device) for key, value in example_batch(rows).items()}
            (-scored_nats(model, batch).sum() / scored).backward()
            stage.advance(len(rows))
    broken = [key for key, total in sums.items() if not bool(torch.isfinite(total).all())]
    if broken:
        raise EditError(
            f"the gradient of {broken[0]} is not finite in {job.run.dtype_name}; use --dtype float32 or bfloat16"
        )
    return sums


def base_weights(adapted: Any, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The frozen weights of an adapted model, by their names in the base."""
    known = {
        name.replace(".base_layer", ""): weight
        for name, weight in adapted.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    return {name: known[name] for name in names}
