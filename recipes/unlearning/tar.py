"""Tamper-resistant unlearning (Tamirisa et al. 2024, arXiv 2408.00761)."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ...artifacts.models.load import LoadedModel
from ...editing.architectures import Architecture
from ...editing.errors import RequestError
from ...editing.hooks.residual_stream import read_streams, streams_kept
from ...editing.modules import causal_model, unembedding
from ...editing.training.entropy import entropy_of_hidden
from ...editing.training.packing import on_device, reading_packed
from ...editing.training.soft_targets import wide
from ..common.adapter_job import MOST_ROWS
from ..common.budgets import Budgets
from ..common.examples import Example, chunked, example_batch, scored_hidden, scored_nats
from ..common.memory_sizes import ModelSizes, Rows
from ..common.trainer import Loss, Terms
from .recipe import UnlearningData, UnlearningJob, UnlearningSettings, describe, learn, memory, prepare, run
from .robust import Vectors, gradient, put_back, with_gradient
from .story import story

__all__ = ["TarSettings", "describe", "learn", "memory", "prepare", "run", "story"]

REPAIRED_FIRST = 1 / 3
"""Share of attackers that read what is retained before they read the concept."""
SWITCH = (6.0, 3.0)
"""The share of its steps that such an attacker does so is drawn from this Beta distribution."""


class TarSettings(UnlearningSettings):
    """TAR (Tamirisa et al. 2024, algorithm 1): ``-H(p_forget)`` where attackers arrive, and on what is retained the NLL and
    the distance of the stream to the base's."""

    recipe = "tar"
    whole_steps = True
    budgets: ClassVar[Budgets] = {"quick": {"steps": 30, "batch_size": 4}, "long": {"steps": 750, "attack_steps": 64}}
    steps: int = Field(150, ge=1, le=MOST_ROWS)
    """Number of optimizer steps; before each of them an attack is trained (paper: 750)."""
    attack_steps: int = Field(8, ge=1, le=4096)
    """K: steps of AdamW that each attacker takes from the model as it is (paper: 64). More take longer."""
    attack_every: int = Field(4, ge=1)
    """Take the gradient of the entropy after every so many of an attacker's steps (paper: 4)."""
    attack_batch: int = Field(4, ge=1)
    """Sequences that an attacker reads in a step (paper: 4)."""
    attack_rates: tuple[float, ...] = (0.1, 1.0, 2.0)
    """Learning rates of attackers, as multiples of learning_rate; each attacker draws one (paper: 0.1, 1 and 2)."""
    attack_decay: float = Field(0.0625, ge=0)
    """The gradient after step i of K weighs exp(attack_decay (i - K)): later ones weigh more (authors' code: 0.0625)."""
    entropy_weight: float = Field(4.0, ge=0)
    """Weight of the entropy. Higher values erase more and damage more (authors' code: 4)."""

    @field_validator("attack_rates", mode="before")
    @classmethod
    def _one_rate(cls, rates: Any) -> Any:
        return [rates] if isinstance(rates, int | float) else rates

    @field_validator("attack_rates")
    @classmethod
    def _some_rate(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or min(rates) <= 0:
            raise ValueError(f"attack_rates={list(rates)} must be numbers above 0; one or more, such as [0.1,1,2]")
        return rates

    @model_validator(mode="after")
    def _some_gradient(self) -> "TarSettings":
        if self.attack_every > self.attack_steps:
            raise ValueError(
                f"attack_every={self.attack_every} is more than attack_steps={self.attack_steps}, so no gradient would be taken;"
                " use at most as many"
            )
        return self

    def vectors_held(self) -> int:
        """Beside those of the options: the way back, the sum, an attacker's gradient and its two moments."""
        return super().vectors_held() + 5

    def rows_at_once(self) -> int:
        """What is to be forgotten, what is retained and what an attacker reads are read one after another."""
        return max(self.batch_size, self.attack_batch)

    def read_together(self, data: UnlearningData) -> Iterator[Sequence[Example]]:
        """Each side of a step, and what its attacker reads."""
        for pairs in chunked(data.pairs, self.batch_size):
            forget, retain = ([pair[side] for pair in pairs] for side in (0, 1))
            yield from (forget, retain, *drawn_attack(self, forget, data).batches)

    def step_bytes(self, sizes: ModelSizes, step: Rows) -> int:
        """How far the stream is from the base's after each layer, in fp32."""
        return 4 * sizes.depth * step.tokens * sizes.width

    def loss(self, job: UnlearningJob, loaded: LoadedModel, data: UnlearningData) -> Loss:
        """Algorithm 1."""
        return TarLoss(self, job.adapter.run.row, job.adapter.run.layers, data)


@dataclass(frozen=True)
class Attack:
    """What one attacker reads, and how fast it learns."""

    batches: Sequence[Sequence[Example]]
    learning_rate: float


def drawn_attack(settings: TarSettings, held_out: Sequence[Example], data: UnlearningData) -> Attack:
    """An attack that does not read ``held_out``. The seed and ``held_out``, in any order, decide it, so that a plan and a run
    that goes on draw the same."""
    rng = random.Random(f"excise tar {settings.seed} {sorted(one.ids for one in held_out)}")
    apart = set(held_out)
    # A pack of so few sequences that all are held out is attacked with them.
    forget = [one for one in data.forget if one not in apart] or list(data.forget)
    steps = settings.attack_steps
    repairs = int(rng.betavariate(*SWITCH) * steps) if rng.random() < REPAIRED_FIRST else 0
    rows = [data.retain if step < repairs else forget for step in range(steps)]
    batches = [rng.sample(list(some), k=min(settings.attack_batch, len(some))) for some in rows]
    return Attack(batches, rng.choice(settings.attack_rates) * settings.learning_rate)


class TarLoss:
    """The gradient of the entropy is taken at an attacker's parameters and counts as if it were taken at the model's."""

    def __init__(self, settings: TarSettings, row: Architecture, layers: int, data: UnlearningData):
        self.settings, self.row, self.layers, self.data = settings, row, layers, data

    def __call__(self, model: Any, batch: dict[str, Any]) -> Terms:
        settings, n = self.settings, batch["forget"]
        if n != settings.batch_size:
            raise RequestError(
                f"a step of {settings.batch_size} pairs does not fit into memory at once, and tar needs its whole gradient;"
                " lower batch_size, or give shorter texts"
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        examples, packed = _examples_of(batch), "blocks" in batch
        value, pull = self._attacked(model, examples[:n], trained, packed)
        retain = settings.retain_weight * self._retain(model, _batch(model, examples[n:], packed))
        return {"forget": with_gradient(value, trained, pull), "retain": retain}

    def _attacked(
        self, model: Any, held_out: Sequence[Example], trained: Sequence[nn.Parameter], packed: bool
    ) -> tuple[Tensor, Vectors]:
        """The weighted negative entropy on what the attacker does not read, summed along its way, and its gradient."""
        settings, attack = self.settings, drawn_attack(self.settings, held_out, self.data)
        value, total = torch.zeros((), device=trained[0].device), [torch.zeros_like(p) for p in trained]
        exam = _batch(model, held_out, packed)
        with put_back(trained), _without_gradients(trained):
            optimizer = torch.optim.AdamW(trained, lr=attack.learning_rate)
            for step, rows in enumerate(attack.batches, 1):
                batch = _batch(model, rows, packed)
                for p, part in zip(trained, gradient(_nats_a_token(model, batch), trained), strict=True):
                    p.grad = part
                optimizer.step()
                if step % settings.attack_every:
                    continue
                weight = settings.entropy_weight * math.exp(settings.attack_decay * (step - len(attack.batches)))
                entropy = entropy_of_hidden(scored_hidden(model, exam), unembedding(model)).mean()
                for sum_, part in zip(total, gradient(-weight * entropy, trained), strict=True):
                    sum_ += part
                value -= weight * entropy.detach()
        return value, total

    def _retain(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Negative log-likelihood of a token, and how far the stream of one is from the base's: a mean over points."""
        points = range(1, self.layers + 1)
        with torch.no_grad(), model.disable_adapter():
            base = self._base_streams(model, batch, points)
        # One forward gives both terms.
        with streams_kept(causal_model(model), self.row, points) as streams:
            nats = _nats_a_token(model, batch)
        tokens = _tokens_of(batch)
        # Each of the base's streams is let go once it is compared: gradients need the difference alone.
        far = [wide(streams[p][tokens] - base.pop(p)[tokens].to(streams[p].device)).norm(dim=-1).mean() for p in points]
        return nats + torch.stack([one.to(nats.device) for one in far]).mean()

    def _base_streams(self, model: Any, batch: dict[str, Any], points: Sequence[int]) -> dict[int, Tensor]:
        """The stream after each layer."""
        if "blocks" in batch:
            with reading_packed(batch) as inputs:
                return read_streams(causal_model(model), self.row, inputs, points)
        return read_streams(
            causal_model(model), self.row, {key: batch[key] for key in ("input_ids", "attention_mask")}, points
        )


def _tokens_of(batch: dict[str, Any]) -> Any:
    """Where the tokens of all sequences are; one that several share counts as often as in padded rows."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    # Where nothing is shared and nothing fills the row up, no copy of it is made.
    return (0, batch["where"]) if batch["again"].shape[1] or len(batch["filling"]) else slice(None)


def _examples_of(batch: dict[str, Any]) -> list[Example]:
    lengths = batch["lengths"].tolist()
    return [Example(ids, len(ids) - length) for ids, length in zip(batch["keys"], lengths, strict=True)]


def _batch(model: Any, examples: Sequence[Example], packed: bool) -> dict[str, Any]:
    batch: dict[str, Any] = on_device(example_batch(examples, in_one_row=packed), next(model.parameters()).device)
    return batch


def _nats_a_token(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return scored_nats(model, batch).mean()


@contextmanager
def _without_gradients(trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give parameters back the gradients that they have: the trainer may be in the middle of a step."""
    before = [p.grad for p in trained]
    try:
        yield
    finally:
        for p, one in zip(trained, before, strict=True):
            p.grad = one
