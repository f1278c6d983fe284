"""Controls of an audit of a behaviour that are made from the base: a model that has it, and one that merely hides it."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....artifacts.events import Events
from ....editing.architectures import architecture_of, layer_count
from ....editing.edits.fake_quantization import changed_weights
from ....editing.errors import ConceptError
from ....editing.modules import is_conv1d, language_config
from ....editing.training.adapters import adapter_modules
from ....editing.training.parallel_adapters import ParallelAdapters, low_rank_attackers
from ....eval.concept import Concept
from ...common.examples import Example, cycled, example_batch, scored_nats
from ...common.step_parts import COUNTS
from ...common.trainer import Group, Schedule, Terms, fit
from ...data.datasets import encoded
from ..suppressed_control import ALPHA, RANK
from .pairs import Pairs

BATCH = 16
TAUGHT_STEPS, TAUGHT_RATE = 120, 2e-3
"""Of the plain fine-tune that has what a task's training teaches unintentionally."""
HIDING_STEPS, HIDING_RATE = 60, 5e-3
"""Of the suppressed control."""
LONGEST_ROW = 1024
"""Tokens of a training row, at most."""


@contextmanager
def taught(model: Any, concept: Concept, tokenizer: Any, seed: int, events: Events, folder: Path) -> Iterator[None]:
    """While this lasts, the base is fine-tuned on the task's own rows, without any ablation; afterwards it is the base.

    Raises:
        ConceptError: The pack has nothing to train on.
    """
    limit = min(int(getattr(language_config(model), "max_position_embeddings", LONGEST_ROW)), LONGEST_ROW)
    rows = encoded(concept.train, tokenizer, limit).examples
    if not rows:
        raise ConceptError(f"concept {concept.ref} has no train.jsonl whose rows fit into {limit} tokens; add one")
    config = model.config.to_dict()
    modules = adapter_modules(model, architecture_of(config), range(layer_count(config)))
    with low_rank_attackers(model, modules, RANK, ALPHA / RANK, [seed]) as update:
        _train(model, update, rows, TAUGHT_STEPS, TAUGHT_RATE, seed, events, folder, "teach the ceiling the task")
        changes = {f"{name}.weight": _change(model.get_submodule(name)) for name in modules}
    # Into the weights, so that attacks which round or move weights meet a plain model.
    names = dict(model.named_parameters())
    weights = {name: names[name] for name in changes}
    with changed_weights(model, lambda name, weight: (weight.float() + changes[name]).to(weight), weights):
        model.eval()
        yield


@torch.no_grad()
def _change(module: Any) -> Tensor:
    change: Tensor = module.scale * (module.up[0] @ module.down[0])
    return change.mT if is_conv1d(module.inner) else change


@contextmanager
def suppressed(model: Any, pairs: Pairs, seed: int, events: Events, folder: Path) -> Iterator[None]:
    """While this lasts, an update of the last layer hides the behaviour: the layers below still have all of it.

    Half of what it reads are prompts that call for the behaviour, with replies that do not show it; the other half are
    neutral prompts with the base's own replies.
    """
    config = model.config.to_dict()
    modules = adapter_modules(model, architecture_of(config), [layer_count(config) - 1])
    with low_rank_attackers(model, modules, RANK, ALPHA / RANK, [seed]) as update:
        order = [list(pairs.hiding), list(pairs.benign)]
        count = max(map(len, order))
        rows = [row for both in zip(*(_cycled(some, count, seed) for some in order), strict=True) for row in both]
        _train(model, update, rows, HIDING_STEPS, HIDING_RATE, seed, events, folder, "train the suppressed control")
        for parameter in update.owned[0]:
            parameter.requires_grad_(False)
        model.eval()
        yield


def _cycled(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    return cycled(rows, count, random.Random(f"excise control {seed}"))


def _train(
    model: nn.Module,
    update: ParallelAdapters,
    rows: Sequence[Example],
    steps: int,
    rate: float,
    seed: int,
    events: Events,
    folder: Path,
    name: str,
) -> None:
    schedule = Schedule(steps, BATCH, rate, seed, decay="constant", warmup_steps=3, beta2=0.999, save_every=0)
    with events.stage(name, steps) as stage:
        fit(
            model,
            _cycled(rows, steps * BATCH, seed),
            stage,
            folder,
            _likely,
            schedule,
            _counted,
            [Group(update.owned[0], rate)],
        )


def _likely(model: nn.Module, batch: dict[str, Any]) -> Terms:
    return {"replies": scored_nats(model, batch).mean()}


def _counted(examples: Sequence[Example]) -> dict[str, Any]:
    batch = example_batch(examples)
    return {**batch, COUNTS: {"replies": len(batch["tokens"])}}
