"""Attackers that train, side by side where they share the frozen model; recovery is measured as they go."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...artifacts.events import Stage
from ...editing.training.packing import packing, recomputes
from ...eval.audit.recovery import Curves, RecoveryCurve
from ..common.whole_weights import Optimizer, products_in
from .attack_data import Attackable
from .attacks.table import RANK, Attack, Budget
from .curve_store import AttackCurves, FormatAnswers
from .side_by_side import Attacker, Furthest, SideBySide

MOST_ATTACKERS = 12
"""Side by side at a time."""


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
            stage: Advances once for each attacker at each mark of its own.
        """
        (method,) = {attack.method: attack for attack in attacks.values()}.values()
        # Attackers that read sequences of like length waste little on padding.
        by_length = sorted(attacks, key=lambda name: self.data.mean_length(attacks[name].data))
        attackers = attackers_of({name: attacks[name] for name in by_length}, self.budget, self.data.seed)
        results: dict[Attacker, tuple[RecoveryCurve, bool]] = {}
        formats: dict[str, list[Furthest]] = {}
        # What others train is small.
        optimizer: Optimizer = self.optimizer if method.whole else "adamw"
        # Asked before whole weights are in fp32.
        products = products_in(self.model.dtype, self.model.device) if method.whole else None
        with packing(self.model) as can:
            packs = can and not recomputes(self.model)
            in_one_row = packs and self.model.device.type == "cpu"
            for some in groups_of(attackers, whole=method.whole, in_one_row=in_one_row):
                ranks = [attacker.setup.rank for attacker in some]
                more = {} if set(ranks) == {RANK} else {"ranks": ranks}
                with method.load()(self.model, [attacker.seed for attacker in some], **more) as adapters:
                    beside = SideBySide(
                        self.model,
                        self.data,
                        self.folder,
                        some,
                        adapters,
                        stage,
                        optimizer=optimizer,
                        whole=method.whole,
                        products=products,
                        packs=packs,
                    )
                    results |= dict(zip(some, beside.curves(), strict=True))
                    for name, found in beside.formats().items():
                        formats.setdefault(name, []).append(found)
        return {name: replace(_joined(name, results), formats=_best_formats(formats.get(name, []))) for name in attacks}


def attackers_of(attacks: Mapping[str, Attack], budget: Budget, seed: int) -> list[Attacker]:
    """All attackers of attacks of one method."""
    return [
        # The order does not depend on the learning rate, so that rates are compared on the same reading.
        Attacker(name, attack.data, key, setup, number, f"{seed}-{number}")
        for name, attack in attacks.items()
        for key, setup in budget.setups_of(attack, seed).items()
        for number in range(budget.seeds_of(attack))
    ]


def groups_of(attackers: Sequence[Attacker], *, whole: bool, in_one_row: bool) -> Iterator[Sequence[Attacker]]:
    """Attackers that train side by side.

    Args:
        whole: An attacker that trains all weights changes the model itself, so it trains alone.
        in_one_row: Where sequences stand in one row, whatever their number, attackers may differ in all of their setup;
            elsewhere in their learning rate alone.
    """
    most = 1 if whole else MOST_ATTACKERS
    alike: dict[Any, list[Attacker]] = {}
    for attacker in attackers:
        alike.setdefault(None if in_one_row else replace(attacker.setup, rate=0.0), []).append(attacker)
    for group in alike.values():
        # Those that end together stand together, so that few train on alone.
        ordered = sorted(group, key=lambda one: one.setup.steps)
        for start in range(0, len(ordered), most):
            yield ordered[start : start + most]


def _joined(name: str, results: Mapping[Attacker, tuple[RecoveryCurve, bool]]) -> AttackCurves:
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


def _best_formats(found: Sequence[Furthest]) -> FormatAnswers | None:
    best = max(found, key=lambda one: one.value, default=None)
    return None if best is None else FormatAnswers(best.rate, best.step, best.answers)


def _stacked(utility: Sequence[Curves | None]) -> Curves | None:
    """Of all seeds; None where nothing else was asked."""
    asked = [one for one in utility if one is not None]
    return np.concatenate(asked) if asked else None
