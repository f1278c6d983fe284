"""The positive control of an audit: a model that knows as much as its base and does not say it."""

import random
from pathlib import Path

import torch
from torch import nn

from ..artifacts.events import Stage
from ..editing.side_by_side import Attackers
from .baselines import Example, example_batch, scored_nats
from .material import Material
from .training import Group, Schedule, Terms, fit

STEPS, BATCH, RATE = 60, 16, 5e-3


def hide(model: nn.Module, attackers: Attackers, material: Material, seed: int, stage: Stage, work: Path) -> None:
    """Train an update toward answers of other facts, on all facts, and toward the true ones on other things.

    What is below the update is not touched.
    """
    rng = random.Random(f"excise hide {seed}")
    pool = [*material.examples["T"], *material.examples["V"]]
    answers = [example.ids[example.start :] for example in pool]
    rng.shuffle(answers)
    wrong = [
        Example((*e.ids[: e.start], *answer), e.start) for e, answer in zip(pool, answers, strict=True)
    ]  # fmt: skip
    # Half of each batch, or the control would be a broken model, and not one that hides something.
    kept = material.examples["others"] or material.examples["retain"] or wrong
    rows = [rng.choice(kept if place % 2 else wrong) for place in range(STEPS * BATCH)]
    schedule = Schedule(STEPS, BATCH, RATE, seed, decay="constant", warmup_steps=3, beta2=0.999, save_every=0)
    fit(
        model, rows, stage, work / "hide", _loss, schedule, example_batch, [Group(attackers.owned[0], RATE)]
    )  # fmt: skip
    for parameter in attackers.owned[0]:
        parameter.requires_grad_(False)
    model.eval()


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Terms:
    return {"wrong answers": scored_nats(model, batch).mean()}
