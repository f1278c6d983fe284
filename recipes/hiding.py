"""The positive control of an audit: a model that knows as much as its base and does not say it."""

import random
from pathlib import Path

import torch
from torch import nn

from ..artifacts.events import Stage
from ..editing.adapters import final_hidden
from ..editing.side_by_side import Attackers
from ..eval.likelihood import pad_right
from .baselines import Example, token_nats
from .material import Material
from .training import Group, Schedule, Terms, fit

STEPS, BATCH, RATE = 60, 16, 5e-3


def hide(model: nn.Module, attackers: Attackers, material: Material, seed: int, stage: Stage, work: Path) -> None:
    """Train an update toward answers of other facts, on all facts; what is below the update is not touched."""
    rng = random.Random(f"excise hide {seed}")
    pool = [*material.examples["T"], *material.examples["V"]]
    answers = [example.ids[example.start :] for example in pool]
    rng.shuffle(answers)
    wrong = [
        Example((*e.ids[: e.start], *answer), e.start) for e, answer in zip(pool, answers, strict=True)
    ]  # fmt: skip
    rows = [rng.choice(wrong) for _ in range(STEPS * BATCH)]
    schedule = Schedule(STEPS, BATCH, RATE, seed, decay="constant", warmup_steps=3, beta2=0.999, save_every=0)
    fit(
        model, rows, stage, work / "hide", _loss, schedule, _collate, [Group(attackers.owned[0], RATE)]
    )  # fmt: skip
    for parameter in attackers.owned[0]:
        parameter.requires_grad_(False)
    model.eval()


def _collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(e.ids) - e.start for e in examples])
    return {
        **pad_right([e.ids for e in examples], torch.device("cpu")),
        "rows": torch.repeat_interleave(torch.arange(len(examples)), lengths),
        "places": torch.cat([torch.arange(e.start - 1, len(e.ids) - 1) for e in examples]),
        "tokens": torch.tensor([token for e in examples for token in e.ids[e.start :]]),
    }  # fmt: skip


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Terms:
    hidden = final_hidden(model, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return {"wrong answers": token_nats(hidden[batch["rows"], batch["places"]], model, batch["tokens"]).mean()}
