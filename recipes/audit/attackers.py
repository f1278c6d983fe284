"""Attackers that train: low-rank, whole, soft prompts and latent vectors, side by side where they share the frozen model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...artifacts.events import Stage
from ...editing.architectures import architecture_of, layer_count
from ...editing.edits.dense import weights_trained
from ...editing.numerics.fake_quantization import linear_weights
from ...editing.training.adapters import adapter_modules
from ...editing.training.parallel_adapters import (
    ParallelAdapters,
    latent_attackers,
    low_rank_attackers,
    soft_prompt_attackers,
)
from ...eval.audit.recovery import RecoveryCurve
from ..common.examples import Example, example_batch, sequence_nll, split_by_length
from ..common.trainer import Group, Schedule, Terms, fit
from .attack_data import AttackData, mean_length, reading_order
from .curve_store import AttackCurves

SOFT_TOKENS = 10
RANK, ALPHA = 8, 16.0
MOST_ATTACKERS = 12
"""Side by side at a time."""
Method = Literal["lora", "full", "soft", "latent"]


@dataclass(frozen=True)
class Attack:
    """One line of the table."""

    tier: int
    """0 needs no training, 1 optimizes inputs, 2 trains weights."""
    about: str
    score: Callable[[Any, AttackData], Sequence[float]] | None = None
    """Hits of a model under an attack without training."""
    method: Method = "lora"
    data: str = ""
    """Source of the training sequences; with a number after a colon, so many of them."""
    known: bool = False
    """Whether the attacker is given what it is examined on, or the base that knows it."""


@dataclass(frozen=True)
class Budget:
    """How much an audit may spend."""

    attacks: tuple[str, ...]
    steps: int
    seeds: int
    rates: Mapping[Method, tuple[float, ...]]
    """Learning rates that each method tries; the one that gets furthest counts."""
    batch: int = 8

    @property
    def marks(self) -> tuple[int, ...]:
        """Steps at which recovery is measured: 0, powers of two, and the last."""
        powers = [2**n for n in range(int(math.log2(self.steps)) + 1)]
        return tuple(sorted({0, *powers, self.steps}))


def trained(
    model: Any, attacks: Mapping[str, Attack], material: AttackData, budget: Budget, seed: int, stage: Stage, work: Path
) -> dict[str, AttackCurves]:
    """A model under several attacks of one method, all rates and seeds of all attacks side by side where they can be."""
    (method,) = {attack.method for attack in attacks.values()}
    # Attackers that read sequences of like length waste little on padding.
    plans = [
        _Plan(name, attacks[name].data, rate, number, f"{seed}-{number}")
        for name in sorted(attacks, key=lambda name: mean_length(material, attacks[name].data))
        for rate in budget.rates[method] for number in range(budget.seeds)
    ]  # fmt: skip
    found: dict[tuple[str, float, int], tuple[RecoveryCurve, bool]] = {}
    size = 1 if method == "full" else MOST_ATTACKERS
    for start in range(0, len(plans), size):
        some = plans[start : start + size]
        with _parameters(model, method, some) as attackers:
            run = _Run(model, some, attackers, material, budget, stage, work)
            found |= {(p.name, p.rate, p.seed): result for p, result in zip(some, run.curves(), strict=True)}
    results = {}
    for name in attacks:
        by_rate = {}
        for rate in budget.rates[method]:
            parts = [found[name, rate, number][0] for number in range(budget.seeds)]
            by_rate[rate] = RecoveryCurve(
                parts[0].steps, parts[0].tokens, np.concatenate([part.hits for part in parts])
            )
        results[name] = AttackCurves(by_rate, sum(bad for (n, _, _), (_, bad) in found.items() if n == name))
    return results


@dataclass(frozen=True)
class _Plan:
    name: str
    data: str
    rate: float
    seed: int
    order: str


@contextmanager
def _parameters(model: Any, method: Method, plans: Sequence[_Plan]) -> Iterator[ParallelAdapters]:
    """What the attackers train; afterwards the model is what it was, bit for bit."""
    row, seeds = architecture_of(model.config.to_dict()), [plan.seed for plan in plans]
    layers = layer_count(model.config.to_dict())
    if method == "soft":
        with soft_prompt_attackers(model, SOFT_TOKENS, seeds) as attackers:
            yield attackers
    elif method == "latent":
        with latent_attackers(model, row, layers // 2, seeds) as attackers:
            yield attackers
    elif method == "lora":
        names = adapter_modules(model, row, range(layers))
        with low_rank_attackers(model, names, RANK, ALPHA, seeds) as attackers:
            yield attackers
    else:
        attackers = ParallelAdapters(1)
        modules = [name.removesuffix(".weight") for name in linear_weights(model)]
        with weights_trained(model, modules) as before:
            attackers.owned = [[p for name, p in model.named_parameters() if name in before]]
            yield attackers


class _Run:
    """Attackers at work on one model."""

    def __init__(
        self, model: Any, plans: Sequence[_Plan], attackers: ParallelAdapters, material: AttackData, budget: Budget, stage: Stage,
        work: Path,
    ):  # fmt: skip
        self.model, self.plans, self.attackers, self.material = model, plans, attackers, material
        self.budget, self.stage, self.work = budget, stage, work
        self.orders = [reading_order(material, plan.data, budget.steps * budget.batch, plan.order) for plan in plans]
        self.hits: list[list[Sequence[float]]] = [[] for _ in plans]
        self.bad: set[int] = set()

    def curves(self) -> list[tuple[RecoveryCurve, bool]]:
        """Train; a curve and whether it diverged, for each plan."""
        budget = self.budget
        self._examine(0)
        schedule = Schedule(
            budget.steps, budget.batch, 1.0, 0, decay="constant", warmup_steps=max(1, budget.steps // 20), beta2=0.999,
            shuffled=False, save_every=0,
        )  # fmt: skip
        groups = [
            Group(owned, plan.rate) for plan, owned in zip(self.plans, self.attackers.owned, strict=True)
        ]  # fmt: skip
        # A row of the trainer is what all attackers read in one place of a batch; orders are their own, not the trainer's.
        ordered = [_Place(place) for place in range(budget.steps * budget.batch)]
        training = self.model.training
        fit(
            self.model, ordered, _Quiet(self.stage), self.work / "attack", self._loss, schedule, self._collate, groups,
            self._examine,
        )  # fmt: skip
        self.model.train(training)
        tokens = self._tokens()
        return [
            (RecoveryCurve(budget.marks, tokens, np.asarray(hits, dtype=float)[None]), place in self.bad)
            for place, hits in enumerate(self.hits)
        ]

    def _collate(self, places: Sequence["_Place"]) -> dict[str, Any]:
        """Every attacker's sequences of one step."""
        return {"places": [place.number for place in places]}

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """Each attacker's mean negative log-likelihood; one that is not finite is taken out, and its rows with it."""
        while True:
            active = [attacker for attacker in range(len(self.plans)) if attacker not in self.bad]
            if not active:
                return {"all diverged": 0.0 * self.attackers.owned[0][0].nan_to_num().sum()}
            losses = self._mean_nats(model, active, batch["places"])
            broken = {
                attacker for attacker, value in zip(active, losses.tolist(), strict=True) if not math.isfinite(value)
            }
            if not broken:
                return {f"attacker {attacker}": losses[place] for place, attacker in enumerate(active)}
            # Even times 0 what is not finite would reach the others' gradients.
            self.bad |= broken

    def _mean_nats(self, model: nn.Module, active: Sequence[int], places: Sequence[int]) -> Tensor:
        """Of each attacker at work, the mean over its sequences of their mean negative log-likelihood."""
        front = self.attackers.prefix
        read = [sorted((self.orders[a][place] for place in places), key=lambda e: len(e.ids)) for a in active]
        # Of every attacker as many: the shortest of each, then the next.
        longest = [max(len(own[place].ids) + front for own in read) for place in range(len(places))]
        device = next(model.parameters()).device
        total, start = torch.zeros(len(active), device=device), 0
        self.attackers.assigned = active
        for size in split_by_length([len(active) * length for length in longest]):
            part = [
                Example((0,) * front + example.ids, example.start + front)
                for own in read for example in own[start : start + size]
            ]  # fmt: skip
            batch = {key: value.to(device) for key, value in example_batch(part).items()}
            total = total + (sequence_nll(model, batch) / batch["lengths"]).view(len(active), size).sum(1)
            start += size
        return total / len(places)

    @torch.no_grad()
    def _examine(self, step: int) -> None:
        if step not in self.budget.marks:
            return
        training = self.model.training
        self.model.eval()
        for place in range(len(self.plans)):
            if place in self.bad:
                self.hits[place].append([0.0] * len(self.material.questions))
            elif step == 0 and place and not self.attackers.prefix:
                # Before its first step an attacker changes nothing.
                self.hits[place].append(self.hits[0][0])
            else:
                with self.attackers.only(place):
                    self.hits[place].append(self.material.exam.hits(self.model, self.attackers.prefix))
            self.stage.advance()
        best: dict[str, float] = {}
        for plan, hits in zip(self.plans, self.hits, strict=True):
            best[plan.name] = max(best.get(plan.name, 0.0), float(np.mean(hits[-1])))
        self.stage.advance(0, at=step, **best)
        self.model.train(training)

    def _tokens(self) -> tuple[int, ...]:
        """Tokens read by one attacker up to each mark, the mean over attackers."""
        per = self.budget.batch
        seen = np.asarray([np.cumsum([0, *(len(e.ids) for e in order)]) for order in self.orders]).mean(0)
        return tuple(int(seen[step * per]) for step in self.budget.marks)


@dataclass(frozen=True)
class _Place:
    number: int


class _Quiet(Stage):
    """Takes in the trainer's steps: an audit counts exams."""

    def __init__(self, stage: Stage):
        super().__init__(stage.events, stage.name)

    def advance(self, steps: int = 1, **_: Any) -> None:
        self.step += steps
