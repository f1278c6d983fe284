"""Some attackers, trained in the same forward passes, each with a setup of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ...artifacts.events import Events, Stage
from ...artifacts.models.memory import free_memory
from ...editing.training.adapters import AdapterShape, adapter_modules
from ...editing.training.parallel_adapters import ParallelAdapters
from ...eval.audit.recovery import RecoveryCurve
from ..common.examples import Example, example_batch, sequence_nll, split_by_length
from ..common.memory_plan import SPARE, fit_step, surely_fits
from ..common.memory_sizes import Gradients, ModelSizes, Rows, Unplanned, sizes_of
from ..common.trainer import Group, Schedule, Terms, fit
from ..common.whole_weights import Optimizer
from .attack_data import Answers, Attackable
from .attacks.fine_tuning import ALPHA_OVER_RANK
from .attacks.table import RANK, Setup


def gradients_of_attackers(sizes: ModelSizes, count: int, rank: int = RANK) -> Gradients:
    """What some attackers on all linear modules train; of other methods, which train less, it is an upper bound."""
    modules = adapter_modules(sizes.model, sizes.row, range(sizes.depth))
    return Gradients(AdapterShape(rank, ALPHA_OVER_RANK * rank, modules), attackers=count)


@dataclass(frozen=True)
class Attacker:
    """One of the attackers of an attack."""

    attack: str
    source: str
    key: float
    """Its learning rate, or its number in a search."""
    setup: Setup
    seed: int
    order: str
    """Seed of the order in which it reads."""


@dataclass
class Furthest:
    """Where one attack gets furthest, and what the attacker was then."""

    value: float
    rate: float
    step: int
    place: int
    owned: list[Tensor]
    """A copy of what it had trained; empty where that is the whole model."""
    answers: dict[str, list[float]]
    """By format; asked of whole models at once, and of others after the last step."""


def beginnings(attackers: Sequence[Attacker], orders: Sequence[Sequence[Example]]) -> dict[int, tuple[int, int]]:
    """Of attackers that are at first what an earlier one is: its place, and for how many steps.

    The same seed, setup and reading make the same attacker, so it need not be trained twice: whoever repairs a model
    first begins as whoever does nothing else.

    Args:
        orders: What each reads.
    """
    found: dict[int, tuple[int, int]] = {}
    for place, one in enumerate(attackers):
        for earlier in range(place):
            other = attackers[earlier]
            if earlier in found or (other.seed, other.setup) != (one.seed, one.setup):
                continue
            steps = _common(orders[earlier], orders[place]) // one.setup.batch
            if steps > found.get(place, (0, 0))[1]:
                found[place] = (earlier, steps)
    return found


def _common(some: Sequence[Example], others: Sequence[Example]) -> int:
    """With how many sequences both begin."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(some), len(others)))


class SideBySide:
    """Some attackers on one model. Each reads, learns and is asked as if it were alone, but for rounding."""

    def __init__(
        self,
        model: Any,
        data: Attackable,
        folder: Path,
        attackers: Sequence[Attacker],
        adapters: ParallelAdapters,
        stage: Stage,
        *,
        optimizer: Optimizer = "adamw",
        whole: bool = False,
        products: torch.dtype | None = None,
        packs: bool = False,
    ):
        """Attackers with setups of their own, if the model packs rows on a processor; elsewhere only rates may differ.

        Args:
            folder: For the trainer's files.
            whole: Whether what is trained is the model itself.
            products: As ``fit`` takes it.
            packs: Whether the model reads packed rows now.
        """
        self.model, self.data, self.folder, self.optimizer = model, data, folder, optimizer
        self.attackers, self.adapters, self.stage = attackers, adapters, stage
        self.whole, self.products = whole, products
        self.device = next(model.parameters()).device
        # Other devices take longer to begin a product for each attacker than for padding.
        self.in_one_row = packs and (self.device.type == "cpu" or len(attackers) == 1)
        self.batch = max(one.setup.batch for one in attackers)
        """Rows of a step; attackers with smaller batches read in some of them."""
        self.orders = [
            data.reading_order(one.source, one.setup.steps * one.setup.batch, one.order) for one in attackers
        ]
        self.begin_as = beginnings(attackers, self.orders) if self.in_one_row else {}
        """Of attackers that are at first what an earlier one is: its place, and for how many steps."""
        self.answers: list[list[Answers]] = [[] for _ in attackers]
        """Of each attacker, at each of its marks so far."""
        self.diverged: set[int] = set()
        self.at_once = len(attackers)
        """Attackers that share a forward."""
        self.furthest: dict[str, Furthest] = {}
        """By attack; only where formats are asked."""

    def curves(self) -> list[tuple[RecoveryCurve, bool]]:
        """Train; a curve and whether it diverged, for each attacker."""
        self._test(0)
        schedule = Schedule(
            max(one.setup.steps for one in self.attackers),
            self.batch,
            # Each group of parameters carries its own rate and its course.
            learning_rate=1.0,
            seed=0,
            beta2=0.999,
            # The order in which an attacker reads is decided already.
            shuffled=False,
            save_every=0,
            optimizer=self.optimizer,
        )
        groups = [
            Group(owned, one.setup.rate, one.setup.share, self.begin_as.get(place))
            for place, (one, owned) in enumerate(zip(self.attackers, self.adapters.owned, strict=True))
        ]
        rows = self._rows(schedule.steps)
        # Progress counts the tests of attackers, so the trainer's own steps are told to nobody.
        untold = Stage(Events(), self.stage.name)
        was_training = self.model.training
        fit(
            self.model,
            rows,
            untold,
            self.folder,
            self._loss,
            schedule,
            collate=lambda some: {"rows": some},
            groups=groups,
            after_step=self._after_step,
            less=self._less,
            parts=self._parts(rows),
            products=self.products,
        )
        self.model.train(was_training)
        return [(self._curve(place), place in self.diverged) for place in range(len(self.attackers))]

    def _rows(self, steps: int) -> list[tuple[Example | None, ...]]:
        """What all attackers read, each in its own order; None beyond an attacker's batch, after its last step, and
        while it is what another is."""
        setups = [one.setup for one in self.attackers]
        first = [self.begin_as.get(place, (0, 0))[1] for place in range(len(setups))]
        return [
            tuple(
                order[step * setup.batch + number] if number < setup.batch and begin <= step < setup.steps else None
                for order, setup, begin in zip(self.orders, setups, first, strict=True)
            )
            for step in range(steps)
            for number in range(self.batch)
        ]

    @torch.no_grad()
    def formats(self) -> dict[str, Furthest]:
        """Ask in several formats, of each attack at the look where it got furthest; afterwards no attacker goes on."""
        questions = self.data.formats
        if questions is None or self.adapters.prefix:
            # Behind a soft prompt, questions are asked in one format alone.
            return {}
        was_training = self.model.training
        self.model.eval()
        for one in self.furthest.values():
            if one.owned:
                for parameter, value in zip(self.adapters.owned[one.place], one.owned, strict=True):
                    parameter.copy_(value)
                with self.adapters.only(one.place):
                    one.answers = questions.ask(self.model)
        self.model.train(was_training)
        return self.furthest

    def _note_furthest(self, step: int, asked: Sequence[int]) -> None:
        """Keep what attackers are now, where an attack never got further."""
        questions = self.data.formats
        if questions is None or self.adapters.prefix:
            return
        for place in asked:
            attacker, value = self.attackers[place], float(np.mean(self.answers[place][-1].hits))
            best = self.furthest.get(attacker.attack)
            # The untouched model is asked elsewhere.
            if step == 0 or place in self.diverged or (best is not None and value <= best.value):
                continue
            trained = self.adapters.owned[self._is_now(place, step)]
            owned = [] if self.whole else [parameter.detach().clone() for parameter in trained]
            # A copy of all weights would take as much memory again.
            answers = questions.ask(self.model) if self.whole else {}
            self.furthest[attacker.attack] = Furthest(value, attacker.key, step, place, owned, answers)

    def _curve(self, place: int) -> RecoveryCurve:
        """What one attacker reached at each of its marks."""
        looks = self.answers[place]
        hits = np.asarray([look.hits for look in looks], dtype=float)[None]
        asked = None
        if looks[0].utility is not None:
            asked = np.asarray([look.utility for look in looks], dtype=float)[None]
        return RecoveryCurve(self.attackers[place].setup.marks, self._tokens(place), hits, utility=asked)

    def _tokens(self, place: int) -> tuple[int, ...]:
        """Tokens that one attacker read up to each of its marks."""
        setup, read = self.attackers[place].setup, np.cumsum([0, *(len(one.ids) for one in self.orders[place])])
        return tuple(int(read[step * setup.batch]) for step in setup.marks)

    def _parts(self, rows: Sequence[Sequence[Example | None]]) -> int:
        """In how many parts a step fits into what is free now."""
        longest = self.adapters.prefix + max(len(example.ids) for row in rows for example in row if example)
        config, count, model = self.model.config.to_dict(), len(self.attackers), self.model
        room = int(SPARE * free_memory(self.device))
        read = Rows(sum(one.setup.batch for one in self.attackers), longest)
        if surely_fits(config, read.tokens, model.dtype.itemsize, room):
            return 1
        trained = sum(p.numel() for owned in self.adapters.owned for p in owned)
        rank = max(one.setup.rank for one in self.attackers)
        try:
            sizes = sizes_of(config, model.dtype)
            # Gradients and moments are still to be made.
            room -= 12 * trained + sizes.head(self.device)
            return fit_step(sizes, gradients_of_attackers(sizes, count, rank), read, room, unit=count).parts
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
            read = self._read(batch["rows"])
            if not read:
                # A loss needs a gradient, so the first parameter stays in it at weight 0.
                return {"nothing to read": 0.0 * self.adapters.owned[0][0].nan_to_num().sum()}
            losses = self._losses(model, read)
            suspects = [place for place, value in zip(read, losses.tolist(), strict=True) if not math.isfinite(value)]
            if not suspects:
                # The mean over an attacker's batch, of which this part of the step holds some.
                parts = self.batch / len(batch["rows"])
                shares = [parts * len(some) / self.attackers[place].setup.batch for place, some in read.items()]
                return {f"attacker {place}": losses[n] * shares[n] for n, place in enumerate(read)}
            # Even times 0 what is not finite reaches the others, in products that they share and in gradients. So each
            # of them is looked at alone.
            with torch.no_grad():
                alone = {place: float(self._mean_nats(model, {place: read[place]})) for place in suspects}
            self.diverged |= {place for place, value in alone.items() if not math.isfinite(value)} or set(suspects)

    def _read(self, rows: Sequence[Sequence[Example | None]]) -> dict[int, list[Example]]:
        """What each attacker that still learns reads of some rows, the shortest first, behind its prefix."""
        front = self.adapters.prefix
        behind, read = (0,) * front, {}
        for place in range(len(self.attackers)):
            some = [example for row in rows if (example := row[place]) is not None]
            if some and place not in self.diverged:
                ordered = sorted(some, key=lambda example: len(example.ids))
                read[place] = [Example(behind + one.ids, one.start + front) for one in ordered]
        return read

    def _losses(self, model: nn.Module, read: Mapping[int, Sequence[Example]]) -> Tensor:
        """Losses of all attackers that read [attackers]; of several groups each is differentiated before the next is
        read."""
        places = list(read)
        groups = [places[start : start + self.at_once] for start in range(0, len(places), self.at_once)]
        if len(groups) == 1:
            return self._mean_nats(model, read)
        parts = []
        for group in groups:
            losses = self._mean_nats(model, {place: read[place] for place in group})
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

    def _mean_nats(self, model: nn.Module, read: Mapping[int, Sequence[Example]]) -> Tensor:
        """Of each attacker, the mean over its sequences of their mean negative log-likelihood [attackers]."""
        places, sequences = list(read), list(read.values())
        if self.in_one_row:
            examples = [example for some in sequences for example in some]
            owners = [number for number, some in enumerate(sequences) for _ in some]
            batch = example_batch(
                examples,
                in_one_row=True,
                by_length=False,
                every=False,
                owners=owners,
                ends=self.adapters.ends(places, self.model.dtype),
            )
            with self.adapters.sharing(places, batch["owned"]):
                batch = send_to_device(batch, self.device)
                nats = sequence_nll(model, batch) / batch["lengths"]
            return torch.stack([some.mean() for some in nats.split(list(map(len, sequences)))])
        # Of every attacker as many: the shortest of each, then the next.
        count = len(sequences[0])
        longest = [max(len(some[n].ids) for some in sequences) for n in range(count)]
        total, start = torch.zeros(len(places), device=self.device), 0
        self.adapters.assigned = places
        # Each row of a forward stands for one of every attacker, so its tokens count that often.
        for size in split_by_length([len(places) * length for length in longest]):
            part = [example for some in sequences for example in some[start : start + size]]
            batch = send_to_device(example_batch(part), self.device)
            # Each attacker's mean, whatever the padding: the sum over attackers gives each the gradient of its own
            # loss.
            total = total + (sequence_nll(model, batch) / batch["lengths"]).view(len(places), size).sum(1)
            start += size
        return total / count

    def _is_now(self, place: int, step: int) -> int:
        """The place of the attacker that one is after some steps: its own, once it goes another way."""
        other, steps = self.begin_as.get(place, (place, 0))
        return other if step <= steps else place

    def _after_step(self, step: int) -> None:
        """Ask, and take out whoever would go on from what has diverged."""
        for place, (other, steps) in self.begin_as.items():
            if step == steps and other in self.diverged:
                self.diverged.add(place)
        self._test(step)

    @torch.no_grad()
    def _test(self, step: int) -> None:
        """Ask the attackers that have a mark at this step."""
        asked = [place for place, one in enumerate(self.attackers) if step in one.setup.marks]
        if not asked:
            return
        was_training = self.model.training
        self.model.eval()
        for place, answers in zip(asked, self._ask(step, asked), strict=True):
            self.answers[place].append(answers)
        self._note_furthest(step, asked)
        best: dict[str, float] = {}
        for place in asked:
            attack, value = self.attackers[place].attack, float(np.mean(self.answers[place][-1].hits))
            best[attack] = max(best.get(attack, 0.0), value)
        # The page of a running audit draws its curves from these figures.
        self.stage.advance(len(asked), at=step, **best)
        self.model.train(was_training)

    def _ask(self, step: int, asked: Sequence[int]) -> list[Answers]:
        data = self.data
        # What has diverged answers nothing; NaN would spoil the mean over seeds.
        nothing = Answers([0.0] * len(data.questions), [0.0] * len(data.others) if data.others else None)
        answers: list[Answers] = []
        for place in asked:
            if step == 0 and answers and not self.adapters.prefix:
                # Before its first step an attacker changes nothing.
                answers.append(answers[0])
                continue
            if (other := self._is_now(place, step)) != place:
                # It has the same setup, so it was asked just before.
                answers.append(answers[asked.index(other)])
                continue
            with self.adapters.only(place):
                answers.append(nothing if place in self.diverged else data.ask(self.model, self.adapters.prefix))
        return answers
