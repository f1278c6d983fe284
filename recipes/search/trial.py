"""One trial: learn the edit, apply it in memory, and measure it with what is cheap first."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.edits import save_edit
from ...editing.edits.base import WeightEdit
from ...editing.errors import ExciseError
from .bench import Bench, Sitting
from .figures import Figure, Guard, Objective, dominated
from .study import CONSTRAINTS, ERROR, FIGURES, SECONDS, SETTINGS, TOKENS, Done, work_folder

NOISE = {"few": 0.15, "all": 0.03}
"""Share of the spread seen so far by which a trial must be worse to be left at a size: few items tell less."""
FEWEST = 4
"""Ended trials below which none is left early."""


@dataclass
class Outcome:
    """What a trial gave."""

    state: str
    values: list[float] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What a search goes by."""

    objectives: Sequence[Objective]
    guards: Sequence[Guard]

    @property
    def figures(self) -> list[Figure]:
        """Everything that trials are measured by."""
        objectives = [one.figure for one in (*self.stand_ins, *self.objectives)]
        return objectives + [one.figure for one in self.guards]

    @property
    def need_replies(self) -> bool:
        """Whether anything is generated."""
        figures = [*(one.figure for one in self.objectives), *(one.figure for one in self.guards)]
        return any(one.generates for one in figures)

    @property
    def stand_ins(self) -> list[Objective]:
        """Objectives as they can be told without replies."""
        return [other for one in self.objectives if (other := one.stand_in())]


def tried(
    learn: Callable[[Path], WeightEdit],
    bench: Bench,
    rules: Rules,
    before: Sequence[Done],
    settings: Mapping[str, Any],
    folder: Path,
) -> Outcome:
    """Learn and measure one edit; what it is stands in ``folder`` afterwards, the model is the base again.

    Args:
        learn: Learns the edit on the bench's base, with a folder to work in.
        before: Trials that ended.
        settings: Those of this trial, for the record.
    """
    began, figures = time.monotonic(), dict[str, dict[str, float]]()
    outcome, generated = Outcome("failed"), 0
    work = work_folder(folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        edit = learn(work)
        save_edit(edit, folder)
        with bench.edited(edit) as sittings:
            outcome = _measured(bench, sittings, rules, before, figures)
            generated = sum(one.generated for one in sittings.values())
    except ExciseError as error:
        outcome = Outcome("failed", record={ERROR: str(error)})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    outcome.record |= {
        SETTINGS: dict(settings),
        FIGURES: figures,
        TOKENS: generated,
        SECONDS: round(time.monotonic() - began, 3),
    }
    return outcome


def _measured(
    bench: Bench,
    sittings: Mapping[str, Sitting],
    rules: Rules,
    before: Sequence[Done],
    figures: dict[str, dict[str, float]],
) -> Outcome:
    """Few items, then all without replies, then replies; a hopeless trial ends before the next."""

    def seen(size: str, wanted: Sequence[Figure]) -> dict[str, float]:
        values = figures.setdefault(size, {})
        for one in wanted:
            if one.name not in values:
                values[one.name] = bench.value(one, sittings[size], size)
        return values

    cheap = [one.figure for one in rules.stand_ins]
    guards = [one.figure for one in rules.guards if not one.figure.generates]
    needs_replies = rules.need_replies
    # Where nothing is generated, a trial that has come this far is known already.
    for size in ("few", "all") if needs_replies else ("few",):
        values = seen(size, [*cheap, *guards])
        if (
            _breaks_a_guard(size, values, rules.guards)
            or _gains_nothing(bench, size, values, rules, before)
            or _is_beaten(size, values, rules.stand_ins, rules, before)
        ):
            return _left(rules.guards, values)
    if needs_replies:
        seen("all", [one.figure for one in rules.objectives if not one.figure.generates])
        if _cannot_win(figures["all"], rules, before):
            return _left(rules.guards, figures["all"])
        values = seen("few", [one.figure for one in rules.objectives])
        if _is_beaten("few", values, rules.objectives, rules, before):
            return _left(rules.guards, figures["all"])
    values = seen("all", [*(one.figure for one in rules.objectives), *(one.figure for one in rules.guards)])
    told = [values[one.figure.name] for one in rules.objectives]
    if not all(map(math.isfinite, told)):
        unknown = next(one.name for one, value in zip(rules.objectives, told, strict=True) if not math.isfinite(value))
        return Outcome("failed", record={ERROR: f"{unknown} has no finite value"})
    record = {CONSTRAINTS: _excesses(rules.guards, values)} if rules.guards else {}
    return Outcome("complete", told, record)


def _excesses(guards: Sequence[Guard], values: Mapping[str, float], unknown: float = 1.0) -> list[float]:
    """How far each guard is broken; what is no number counts as broken.

    Args:
        unknown: Of what was not measured.
    """
    found = [one.excess(values[one.figure.name]) if one.figure.name in values else unknown for one in guards]
    return [value if math.isfinite(value) else 1.0 for value in found]


def _left(guards: Sequence[Guard], values: Mapping[str, float]) -> Outcome:
    """A trial that ends early, with what is known of its guards."""
    return Outcome("pruned", record={CONSTRAINTS: _excesses(guards, values, 0.0)} if guards else {})


def _breaks_a_guard(size: str, values: Mapping[str, float], guards: Sequence[Guard]) -> bool:
    for one in guards:
        # On few items a guard that is barely broken may hold on all of them.
        slack = max(0.05, abs(one.limit)) if size == "few" else 0.0
        if not one.figure.generates and not one.excess(values[one.figure.name]) <= slack:
            return True
    return False


def _gains_nothing(bench: Bench, size: str, values: Mapping[str, float], rules: Rules, before: Sequence[Done]) -> bool:
    """Whether the unchanged base is as good in every objective: an edit that does nothing moves nothing."""
    stand_ins = rules.stand_ins
    if len(stand_ins) < len(rules.objectives):
        return False
    # Nothing needs to be known of other trials for this; their spread only widens what counts as nothing.
    margins = _margins(size, stand_ins, before, NOISE["all"])
    base = [bench.of_base(one.figure, size) for one in stand_ins]
    return all(
        one.signed(values[one.figure.name]) > one.signed(value) - margin
        for one, value, margin in zip(stand_ins, base, margins, strict=True)
    )


def _cannot_win(values: Mapping[str, float], rules: Rules, before: Sequence[Done]) -> bool:
    """Whether another is better even if every figure that is not known yet were the best that it can be."""
    hoped = [one.signed(values.get(one.figure.name, one.bound)) for one in rules.objectives]
    complete = [done.values for done in before if done.state == "complete" and done.feasible]
    for known in complete:
        theirs = [one.signed(value) for one, value in zip(rules.objectives, known, strict=True)]
        if theirs != hoped and all(one <= other for one, other in zip(theirs, hoped, strict=True)):
            return True
    return False


def _is_beaten(
    size: str, values: Mapping[str, float], objectives: Sequence[Objective], rules: Rules, before: Sequence[Done]
) -> bool:
    """Whether a trial that keeps the guards is better in every objective, beyond noise.

    Args:
        objectives: Those of the search, or what stands in for them.
    """
    if len(objectives) < len(rules.objectives) or len(before) < FEWEST:
        return False

    def point(of: Mapping[str, float]) -> list[float]:
        return [one.signed(of[one.figure.name]) for one in objectives]

    complete = [done for done in before if done.state == "complete" and done.feasible]
    others = [point(done.figures[size]) for done in complete if _knows(done, size, objectives)]
    ours = point(values)
    if not all(map(math.isfinite, ours)):
        return True
    return dominated(ours, others, _margins(size, objectives, before, NOISE[size]))


def _margins(size: str, objectives: Sequence[Objective], before: Sequence[Done], share: float) -> list[float]:
    """The part of each objective's spread, among the trials that ended, that counts as noise."""
    return [
        share
        * _spread([one.signed(done.figures[size][one.figure.name]) for done in before if _knows(done, size, [one])])
        for one in objectives
    ]


def _knows(done: Done, size: str, objectives: Sequence[Objective]) -> bool:
    return all(one.figure.name in done.figures.get(size, {}) for one in objectives)


def _spread(column: Sequence[float]) -> float:
    """How far values lie apart, without the worst tenth, which broken models would stretch."""
    ordered = sorted(value for value in column if math.isfinite(value))
    return ordered[int(0.9 * (len(ordered) - 1))] - ordered[0] if ordered else 0.0
