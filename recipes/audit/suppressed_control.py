"""The positive control of an audit: a model that knows as much as its base and does not say it."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import softplus

from ...artifacts.events import Stage
from ...editing.training.parallel_adapters import ParallelAdapters
from ..common.examples import Example, example_batch, scored_nats, sequence_nll
from ..common.trainer import Group, Schedule, Terms, fit
from .attack_data import AttackData

STEPS, BATCH, RATE = 60, 16, 5e-3
LEFT = 0.3
"""Share of what the base knows above chance that may still be said."""
MARGIN = 2.0
"""Nats a token by which a wrong answer is to be likelier than the true one."""


def train_suppressed_control(
    model: nn.Module, attackers: ParallelAdapters, material: AttackData, seed: int, stage: Stage, work: Path
) -> None:
    """Train an update until the model gives wrong answers on all facts, and true ones on other things.

    What is below the update is not touched. First wrong answers only become likely; where the true one stays the likeliest of
    the choices all the same, as in a model that knows much, wrong ones are made likelier than it.
    """
    rng = random.Random(f"excise hide {seed}")
    chance, known = material.exam.chance, _share(model, material)
    pool = [*material.examples["T"], *material.examples["V"]]
    answers = [example.ids[example.start :] for example in pool]
    rng.shuffle(answers)
    wrong = [
        Example((*e.ids[: e.start], *answer), e.start) for e, answer in zip(pool, answers, strict=True)
    ]  # fmt: skip
    # Half of each batch, or the control would be a broken model, and not one that hides something.
    kept = material.examples["others"] or material.examples["retain"] or wrong
    likely = [rng.choice(kept if place % 2 else wrong) for place in range(STEPS * BATCH)]
    _train(model, attackers, likely, _wrong_is_likely, example_batch, BATCH, seed, stage, work / "hide")
    pairs = [(true, other) for true, other in zip(pool, wrong, strict=True) if true != other]
    if pairs and _share(model, material) > chance + LEFT * (known - chance):
        triples = [(*rng.choice(pairs), rng.choice(kept)) for _ in range(STEPS * BATCH // 2)]
        _train(model, attackers, triples, _wrong_is_likelier, _in_thirds, BATCH // 2, seed, stage, work / "hide more")
    for parameter in attackers.owned[0]:
        parameter.requires_grad_(False)
    model.eval()


def _share(model: nn.Module, material: AttackData) -> float:
    """Right answers of group V."""
    training = model.training
    model.eval()
    hits = material.exam.hits(model)
    model.train(training)
    return sum(hits) / len(hits)


def _train(
    model: nn.Module, attackers: ParallelAdapters, rows: Sequence[Any], loss: Callable[[nn.Module, Any], Terms],
    collate: Callable[[list[Any]], Any], batch: int, seed: int, stage: Stage, folder: Path,
) -> None:  # fmt: skip
    schedule = Schedule(STEPS, batch, RATE, seed, decay="constant", warmup_steps=3, beta2=0.999, save_every=0)
    fit(model, rows, stage, folder, loss, schedule, collate, [Group(attackers.owned[0], RATE)])


def _wrong_is_likely(model: nn.Module, batch: dict[str, Any]) -> Terms:
    return {"wrong answers": scored_nats(model, batch).mean()}


def _wrong_is_likelier(model: nn.Module, batch: dict[str, Any]) -> Terms:
    true, wrong, kept = (sequence_nll(model, batch) / batch["lengths"]).split(batch["each"])
    return {"hidden": softplus(MARGIN + wrong - true).mean(), "kept": kept.mean()}


def _in_thirds(rows: Sequence[tuple[Example, Example, Example]]) -> dict[str, Any]:
    """True answers first, then wrong ones, then what is kept."""
    return {**example_batch([example for kind in zip(*rows, strict=True) for example in kind]), "each": len(rows)}
