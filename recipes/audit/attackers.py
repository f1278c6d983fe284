"""Attackers that train, side by side where they share the frozen model; recovery is measured as they go."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ...artifacts.events import Events, Stage
from ...artifacts.models.memory import free_memory
from ...editing.training.adapters import AdapterShape, adapter_modules
from ...editing.training.packing import packing, recomputes
from ...editing.training.parallel_adapters import ParallelAdapters
from ...eval.audit.recovery import Curves, RecoveryCurve
from ..common.examples import Example, example_batch, sequence_nll, split_by_length
from ..common.memory_plan import SPARE, fit_step, surely_fits
from ..common.memory_sizes import Gradients, ModelSizes, Rows, Unplanned, sizes_of
from ..common.trainer import Group, Schedule, Terms, fit
from ..common.whole_weights import Optimizer, products_in
from .attack_data import Answers, Attackable
from .attacks.fine_tuning import ALPHA_OVER_RANK
from .attacks.table import RANK, Attack, Budget, Setup
from .curve_store import AttackCurves, FormatAnswers

MOST_ATTACKERS = 12
"""Side by side at a time."""


def gradients_of_attackers(sizes: ModelSizes, count: int, rank: int = RANK) -> Gradients:
    """What some attackers on all linear modules train; of other methods, which train less, it is an upper bound."""
    modules = adapter_modules(sizes.model, sizes.row, range(sizes.depth))
    return Gradients(AdapterShape(rank, ALPHA_OVER_RANK * rank, modules), attackers=count)


@dataclass(frozen=True)
class AttackTraining:
    """One model and all that attackers need to train on it."""

    model: Any
    data: Attackable
    budget: Budget
    folder: Path
    """For the trainer's files."""
    optimizer: Optimizer = "adamw"
    """Of attackers that train all weights."""

    def curves(self, attacks: Mapping[str, Attack], stage: Stage) -> dict[str, AttackCurves]:
        """Run attacks of one method: all their learning rates and seeds, as many side by side as fit.

        Args:
            stage: Advances once for each attacker at each mark of the budget.
        """
        (method,) = {attack.method: attack for attack in attacks.values()}.values()
        attackers = self._attackers(attacks)
        results: dict[_Attacker, tuple[RecoveryCurve, bool]] = {}
        formats: dict[str, list[_Furthest]] = {}
        # An attacker that trains all weights changes the model itself, so it trains alone.
        size = 1 if method.whole else MOST_ATTACKERS
        # What others train is small.
        training = self if method.whole else replace(self, optimizer="adamw")
        # Asked before whole weights are in fp32.
        products = products_in(self.model.dtype, self.model.device) if method.whole else None
        with packing(self.model) as can:
            packs = can and not recomputes(self.model)
            for some in _alike(attackers, size):
                rank = {} if some[0].setup.rank == RANK else {"rank": some[0].setup.rank}
                with method.load()(self.model, [attacker.seed for attacker in some], **rank) as adapters:
                    how: dict[str, Any] = {"whole": method.whole, "products": products, "packs": packs}
                    beside = _SideBySide(training, some, adapters, stage, **how)
                    results |= dict(zip(some, beside.curves(), strict=True))
                    for name, found in beside.formats().items():
                        formats.setdefault(name, []).append(found)
        return {name: replace(_joined(name, results), formats=_best_formats(formats.get(name, []))) for name in attacks}

    def _attackers(self, attacks: Mapping[str, Attack]) -> list["_Attacker"]:
        # Attackers that read sequences of like length waste little on padding.
        by_length = sorted(attacks, key=lambda name: self.data.mean_length(attacks[name].data))
        return [
            # The order does not depend on the learning rate, so that rates are compared on the same reading.
            _Attacker(name, attacks[name].data, key, setup, number, f"{self.data.seed}-{number}")
            for name in by_length
            for key, setup in self.budget.setups_of(attacks[name], self.data.seed).items()
            for number in range(self.budget.seeds_of(attacks[name]))
        ]


@dataclass(frozen=True)
class _Attacker:
    attack: str
    source: str
    key: float
    """Its learning rate, or its number in a search."""
    setup: Setup
    seed: int
    order: str
    """Seed of the order in which it reads."""


def _alike(attackers: Sequence[_Attacker], most: int) -> Iterator[list[_Attacker]]:
    """Attackers that differ in their learning rate alone, at most so many at a time: they can train side by side."""
    groups: dict[Setup, list[_Attacker]] = {}
    for attacker in attackers:
        groups.setdefault(replace(attacker.setup, rate=0.0), []).append(attacker)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _joined(name: str, results: Mapping[_Attacker, tuple[RecoveryCurve, bool]]) -> AttackCurves:
    """One attack's curves by learning rate, its seeds together."""
    by_rate: dict[float, list[RecoveryCurve]] = {}
    diverged = 0
    for attacker, (curve, broken) in results.items():
        if attacker.attack == name:
            by_rate.setdefault(attacker.key, []).append(curve)
            diverged += broken
    return AttackCurves(
        {
            rate: RecoveryCurve(
                curves[0].steps,
                # Seeds read texts of different lengths, and their curves need one axis.
                tuple(int(read) for read in np.mean([curve.tokens for curve in curves], axis=0)),
                np.concatenate([curve.hits for curve in curves]),
                utility=_stacked([curve.utility for curve in curves]),
            )
            for rate, curves in by_rate.items()
        },
        diverged,
    )


def _best_formats(found: Sequence["_Furthest"]) -> FormatAnswers | None:
    best = max(found, key=lambda one: one.value, default=None)
    return None if best is None else FormatAnswers(best.rate, best.step, best.answers)


@dataclass
class _Furthest:
    """Where one attack gets furthest, and what the attacker was then."""

    value: float
    rate: float
    step: int
    place: int
    owned: list[Tensor]
    """A copy of what it had trained; empty where that is the whole model."""
    answers: dict[str, list[float]]
    """By format; asked of whole models at once, and of others after the last step."""


def _stacked(utility: Sequence[Curves | None]) -> Curves | None:
    """Of all seeds; None where nothing else was asked."""
    asked = [one for one in utility if one is not None]
    return np.concatenate(asked) if asked else None


class _SideBySide:
    """Some attackers, trained in the same forward passes."""

    def __init__(
        self,
        training: AttackTraining,
        attackers: Sequence[_Attacker],
        adapters: ParallelAdapters,
        stage: Stage,
        *,
        whole: bool,
        products: torch.dtype | None = None,
        packs: bool = False,
    ):
        """``whole`` if what is trained is the model itself; ``products`` as ``fit`` takes it; ``packs`` if the model reads
        packed rows now."""
        self.whole, self.products, self.packs = whole, products, packs
        self.training, self.attackers, self.adapters, self.stage = training, attackers, adapters, stage
        self.setup = attackers[0].setup
        """All of them share it but for its learning rate."""
        count = self.setup.steps * self.setup.batch
        self.orders = [training.data.reading_order(one.source, count, one.order) for one in attackers]
        self.answers: list[list[Answers]] = [[] for _ in attackers]
        """Of each attacker, at each mark so far."""
        self.diverged: set[int] = set()
        self.at_once = len(attackers)
        """Attackers that share a forward."""
        self.furthest: dict[str, _Furthest] = {}
        """By attack; only where formats are asked."""

    def curves(self) -> list[tuple[RecoveryCurve, bool]]:
        """Train; a curve and whether it diverged, for each attacker."""
        model, setup = self.training.model, self.setup
        self._test(0)
        schedule = Schedule(
            setup.steps,
            setup.batch,
            # Only learning rates differ between attackers, and each group of parameters carries its own.
            learning_rate=1.0,
            seed=0,
            decay=setup.decay,
            warmup_steps=setup.warmup,
            # The first mark is step 1. The library's cosine, of a search alone, begins its warm-up at 0.
            idle_first_step=setup.decay == "cosine",
            beta2=0.999,
            # The order in which an attacker reads is decided already.
            shuffled=False,
            save_every=0,
            optimizer=self.training.optimizer,
        )
        groups = [Group(owned, one.setup.rate) for one, owned in zip(self.attackers, self.adapters.owned, strict=True)]
        # A row of the trainer is what all attackers read at one place, each in its own order.
        rows = list(zip(*self.orders, strict=True))
        # Progress counts the tests of attackers, so the trainer's own steps are told to nobody.
        untold = Stage(Events(), self.stage.name)
        was_training = model.training
        fit(
            model,
            rows,
            untold,
            self.training.folder,
            self._loss,
            schedule,
            collate=lambda some: {"rows": some},
            groups=groups,
            after_step=self._test,
            less=self._less,
            parts=self._parts(rows),
            products=self.products,
        )
        model.train(was_training)
        return [(self._curve(place), place in self.diverged) for place in range(len(self.attackers))]

    @torch.no_grad()
    def formats(self) -> dict[str, "_Furthest"]:
        """Ask in several formats, of each attack at the look at which it got furthest; afterwards no attacker goes on."""
        questions = self.training.data.formats
        if questions is None or self.adapters.prefix:
            # Behind a soft prompt, questions are asked in one format alone.
            return {}
        model = self.training.model
        was_training = model.training
        model.eval()
        for one in self.furthest.values():
            if one.owned:
                for parameter, value in zip(self.adapters.owned[one.place], one.owned, strict=True):
                    parameter.copy_(value)
                with self.adapters.only(one.place):
                    one.answers = questions.ask(model)
        model.train(was_training)
        return self.furthest

    def _note_furthest(self, step: int) -> None:
        """Keep what attackers are now, where an attack never got further."""
        questions = self.training.data.formats
        if questions is None or self.adapters.prefix:
            return
        for place, attacker in enumerate(self.attackers):
            value, best = float(np.mean(self.answers[place][-1].hits)), self.furthest.get(attacker.attack)
            # The untouched model is asked elsewhere.
            if step == 0 or place in self.diverged or (best is not None and value <= best.value):
                continue
            owned = [] if self.whole else [parameter.detach().clone() for parameter in self.adapters.owned[place]]
            # A copy of all weights would take as much memory again.
            asked = questions.ask(self.training.model) if self.whole else {}
            self.furthest[attacker.attack] = _Furthest(value, attacker.key, step, place, owned, asked)

    def _curve(self, place: int) -> RecoveryCurve:
        """What one attacker reached at each mark."""
        looks = self.answers[place]
        hits = np.asarray([look.hits for look in looks], dtype=float)[None]
        asked = None
        if looks[0].utility is not None:
            asked = np.asarray([look.utility for look in looks], dtype=float)[None]
        return RecoveryCurve(self.setup.marks, self._tokens(place), hits, utility=asked)

    def _parts(self, rows: Sequence[Sequence[Example]]) -> int:
        """In how many parts a step fits into what is free now."""
        model, batch = self.training.model, self.setup.batch
        longest = self.adapters.prefix + max(len(example.ids) for row in rows for example in row)
        config, device, count = model.config.to_dict(), next(model.parameters()).device, len(self.attackers)
        room = int(SPARE * free_memory(device))
        if surely_fits(config, count * batch * longest, model.dtype.itemsize, room):
            return 1
        trained = sum(p.numel() for owned in self.adapters.owned for p in owned)
        read = Rows(count * batch, longest)
        try:
            sizes = sizes_of(config, model.dtype)
            # Gradients and moments are still to be made.
            room -= 12 * trained + sizes.head(device)
            return fit_step(sizes, gradients_of_attackers(sizes, count, self.setup.rank), read, room, unit=count).parts
        except Unplanned:
            return 1

    def _less(self) -> bool:
        """Half as many attackers in a forward, because memory ran out."""
        if self.at_once == 1:
            return False
        self.at_once = (self.at_once + 1) // 2
        return True

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """Each attacker's mean negative log-likelihood; one that is not finite is taken out, and its rows with it."""
        while True:
            active = [place for place in range(len(self.attackers)) if place not in self.diverged]
            if not active:
                # A loss needs a gradient, so the first parameter stays in it at weight 0.
                return {"all diverged": 0.0 * self.adapters.owned[0][0].nan_to_num().sum()}
            losses = self._losses(model, active, batch["rows"])
            broken = {place for place, value in zip(active, losses.tolist(), strict=True) if not math.isfinite(value)}
            if not broken:
                return {f"attacker {place}": losses[number] for number, place in enumerate(active)}
            # Even times 0 what is not finite would reach the others' gradients.
            self.diverged |= broken

    def _losses(self, model: nn.Module, active: Sequence[int], rows: Sequence[Sequence[Example]]) -> Tensor:
        """Losses of all active attackers [active]; of several groups each is differentiated before the next is read."""
        groups = [active[start : start + self.at_once] for start in range(0, len(active), self.at_once)]
        if len(groups) == 1:
            return self._mean_nats(model, active, rows)
        parts = []
        for group in groups:
            losses = self._mean_nats(model, group, rows)
            if not bool(losses.isfinite().all()):
                # Whoever is broken is taken out, and the step begun again.
                parts.append(losses.detach())
                continue
            for number, place in enumerate(group):
                owned = self.adapters.owned[place]
                gradients = torch.autograd.grad(losses[number], owned, retain_graph=number + 1 < len(group))
                # Nothing in value, with the attacker's gradient: the trainer goes backward through it.
                lever = torch.stack([(p * g).sum() for p, g in zip(owned, gradients, strict=True)]).sum()
                parts.append((losses[number].detach() + (lever - lever.detach()))[None])
            del losses
        return torch.cat(parts)

    def _mean_nats(self, model: nn.Module, active: Sequence[int], rows: Sequence[Sequence[Example]]) -> Tensor:
        """Of each active attacker, the mean over its sequences of their mean negative log-likelihood [active]."""
        front, device = self.adapters.prefix, next(model.parameters()).device
        behind = (0,) * front
        read = [
            [Example(behind + e.ids, e.start + front) for e in sorted((r[p] for r in rows), key=lambda e: len(e.ids))]
            for p in active
        ]
        # Other devices take longer to begin a product for each attacker than for padding.
        if self.packs and (device.type == "cpu" or len(active) == 1):
            examples = [example for sequences in read for example in sequences]
            owners = [number for number, sequences in enumerate(read) for _ in sequences]
            batch = example_batch(examples, in_one_row=True, by_length=False, every=False, owners=owners)
            with self.adapters.sharing(active, batch["owned"]):
                batch = send_to_device(batch, device)
                return (sequence_nll(model, batch) / batch["lengths"]).view(len(active), -1).mean(1)
        # Of every attacker as many: the shortest of each, then the next.
        longest = [max(len(sequences[n].ids) for sequences in read) for n in range(len(rows))]
        total, start = torch.zeros(len(active), device=device), 0
        self.adapters.assigned = active
        # Each row of a forward stands for one of every active attacker, so its tokens count that often.
        for size in split_by_length([len(active) * length for length in longest]):
            part = [example for sequences in read for example in sequences[start : start + size]]
            batch = send_to_device(example_batch(part), device)
            # Each attacker's mean, whatever the padding: the sum over attackers gives each the gradient of its own
            # loss.
            total = total + (sequence_nll(model, batch) / batch["lengths"]).view(len(active), size).sum(1)
            start += size
        return total / len(rows)

    @torch.no_grad()
    def _test(self, step: int) -> None:
        """Ask every attacker the questions of group V, at the budget's marks."""
        if step not in self.setup.marks:
            return
        model = self.training.model
        was_training = model.training
        model.eval()
        for place in range(len(self.attackers)):
            self.answers[place].append(self._ask(place, step))
            self.stage.advance()
        self._note_furthest(step)
        best: dict[str, float] = {}
        for attacker, answers in zip(self.attackers, self.answers, strict=True):
            best[attacker.attack] = max(best.get(attacker.attack, 0.0), float(np.mean(answers[-1].hits)))
        # The page of a running audit draws its curves from these figures.
        self.stage.advance(0, at=step, **best)
        model.train(was_training)

    def _ask(self, place: int, step: int) -> Answers:
        data = self.training.data
        # What has diverged answers nothing; NaN would spoil the mean over seeds.
        if place in self.diverged:
            return Answers([0.0] * len(data.questions), [0.0] * len(data.others) if data.others else None)
        if step == 0 and place and not self.adapters.prefix:
            # Before its first step an attacker changes nothing.
            return self.answers[0][0]
        with self.adapters.only(place):
            return data.ask(self.training.model, self.adapters.prefix)

    def _tokens(self, place: int) -> tuple[int, ...]:
        """Tokens that one attacker read up to each mark."""
        read = np.cumsum([0, *(len(example.ids) for example in self.orders[place])])
        return tuple(int(read[step * self.setup.batch]) for step in self.setup.marks)
