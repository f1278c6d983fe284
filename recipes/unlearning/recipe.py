"""Unlearning methods that ELM is compared with, under the same trainer, data, export and measurements.

Each minimizes one line, given in its settings' docstring; y is the answer of a forget context, or a whole forget text
where the pack's facts are not found.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.hooks.residual_stream import read_streams
from ...editing.modules import causal_model
from ..common import adapter_run
from ..common.adapter_run import AdapterSettings, TrainingPlan
from ..common.examples import Example, cycled, example_batch, sequence_nll
from ..common.measured_run import Finished
from ..common.tokens import Row, text_limit
from ..common.trainer import Loss, Terms
from ..data.facts import Facts, find_facts
from ..data.unlearning_sets import forget_examples, retain_examples


class UnlearningSettings(AdapterSettings):
    """Keys of every baseline."""

    method: ClassVar[str]
    retain_weight: float = Field(1.0, ge=0)
    """Weight of the retain term."""


class GradDiffSettings(UnlearningSettings):
    """Gradient difference (Liu et al. 2022; Maini et al. 2024): ``log p(y_forget) - log p(y_retain)``."""

    method: ClassVar[str] = "grad_diff"


class NpoSettings(UnlearningSettings):
    """NPO (Zhang et al. 2024, equation 3): ``2/beta log(1 + (p(y)/p_base(y))^beta)``, and the retain texts' NLL."""

    method: ClassVar[str] = "npo"
    beta: float = Field(0.1, gt=0)
    """Inverse temperature (paper: 0.1)."""


class SimNpoSettings(UnlearningSettings):
    """SimNPO (Fan et al. 2024, equation 5): ``-2/beta log sigmoid(-beta/|y| log p(y) - gamma)``, and the retain texts' NLL."""

    method: ClassVar[str] = "simnpo"
    beta: float = Field(2.5, gt=0)
    """Inverse temperature (paper, TOFU: 2.5)."""
    gamma: float = 0.0
    """Margin (paper: 0)."""


class RmuSettings(UnlearningSettings):
    """RMU (Li et al. 2024, section 4): ``|h_forget - c u|^2 + alpha |h_retain - h_base|^2`` at one layer, u random."""

    method: ClassVar[str] = "rmu"
    steer_layer: float = Field(0.22, gt=0, le=1)
    """Depth of the steered layer's output (paper: layer 7 of 32); adapters sit at and below it."""
    steering: float = Field(6.5, gt=0)
    """c, in units of the median norm of the model's own activations there, so that it carries between models (paper: 6.5)."""
    retain_weight: float = Field(1200.0, ge=0)
    """alpha (paper: 1200)."""


BASELINES: dict[str, type[UnlearningSettings]] = {
    kind.method: kind for kind in (GradDiffSettings, NpoSettings, SimNpoSettings, RmuSettings)
}


@dataclass(frozen=True)
class UnlearningJob:
    """A checked request."""

    adapter: adapter_run.AdapterJob
    settings: UnlearningSettings
    facts: Facts


def prepare(settings: UnlearningSettings, *, resume: bool = False) -> UnlearningJob:
    """Check names, files, memory and disk, before any weight is read."""
    checked = adapter_run.prepare(settings.method, settings, resume=resume)
    if isinstance(settings, RmuSettings):
        checked = adapter_run.up_to(checked, _steered(settings, checked.job.layers))
    return UnlearningJob(checked, settings, find_facts(checked.job.concept))


def describe(prepared: UnlearningJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_run.describe(prepared.adapter, facts_found=len(prepared.facts.facts))


def run(prepared: UnlearningJob, events: Events) -> Finished:
    """Do the whole run: read the data, train, merge, measure, publish."""
    name = prepared.settings.method
    return adapter_run.run(
        prepared.adapter, lambda loaded, seen, _: _lessons(prepared, loaded, seen), f"edited with {name}", events
    )


def _lessons(prepared: UnlearningJob, loaded: LoadedModel, events: Events) -> TrainingPlan:
    settings, concept = prepared.settings, prepared.adapter.concept
    with events.stage("read the base on what is to be trained") as stage:
        limit = text_limit(loaded.model)
        forget = forget_examples(concept, prepared.facts, loaded.tokenizer, settings.seed, limit)
        retain = retain_examples(concept, loaded.tokenizer, settings.seed, limit)
        count = settings.steps * settings.batch_size
        pairs = list(zip(
            cycled(forget, count, random.Random(f"excise forget {settings.seed}")),
            cycled(retain, count, random.Random(f"excise retain {settings.seed}")), strict=True
        ))  # fmt: skip
        # Of a pack with many contexts, a short training reads a part only.
        read = list(dict.fromkeys(example for example, _ in pairs))
        reference = _references(loaded.model, read, stage.advance) if isinstance(settings, NpoSettings) else {}
        loss = LOSSES[settings.method](prepared, loaded, reference)
    training = {
        "about": (type(settings).__doc__ or "").split(":")[0] + ".", "steps": settings.steps,
        "rows": 2 * settings.batch_size, "data": f"{len(forget)} sequences to forget, {len(retain)} to retain",
        "lessons": {"forget": len(forget), "retain": len(retain)},
    }  # fmt: skip
    rows = [example.ids for example in (*forget[:8], *retain[:8])]
    return TrainingPlan(pairs, collate, loss, rows, training, {"warnings": list(prepared.adapter.warnings)})


def collate(pairs: Sequence[tuple[Example, Example]]) -> dict[str, Any]:
    """Forget rows first, then retain rows."""
    examples = [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
    return {**example_batch(examples), "forget": len(pairs), "keys": [example.ids for example in examples]}


Reference = Mapping[Row, float]
"""Log-likelihood of each forget sequence under the base."""


def _grad_diff(prepared: UnlearningJob, loaded: LoadedModel, reference: Reference) -> Loss:
    return _on_likelihoods(prepared, lambda nll, lengths, _: -(nll / lengths).mean(), reference)


def _npo(prepared: UnlearningJob, loaded: LoadedModel, reference: Reference) -> Loss:
    settings = prepared.settings
    assert isinstance(settings, NpoSettings)

    def forget(nll: Tensor, lengths: Tensor, base: Tensor) -> Tensor:
        return (2 / settings.beta) * nn.functional.softplus(settings.beta * (-nll - base)).mean()

    return _on_likelihoods(prepared, forget, reference)


def _simnpo(prepared: UnlearningJob, loaded: LoadedModel, reference: Reference) -> Loss:
    settings = prepared.settings
    assert isinstance(settings, SimNpoSettings)

    def forget(nll: Tensor, lengths: Tensor, _: Tensor) -> Tensor:
        margin = settings.beta * nll / lengths - settings.gamma
        return (-2 / settings.beta) * nn.functional.logsigmoid(margin).mean()

    return _on_likelihoods(prepared, forget, reference)


def _on_likelihoods(
    prepared: UnlearningJob, forget: Callable[[Tensor, Tensor, Tensor], Tensor], reference: Reference
) -> Loss:
    weight = prepared.settings.retain_weight

    def loss(model: nn.Module, batch: dict[str, Any]) -> Terms:
        nll, n = sequence_nll(model, batch), batch["forget"]
        base = torch.tensor([reference.get(key, 0.0) for key in batch["keys"][:n]], device=nll.device)
        lengths = batch["lengths"].to(nll.device)
        return {"forget": forget(nll[:n], lengths[:n], base), "retain": weight * (nll[n:] / lengths[n:]).mean()}

    return loss


def _rmu(prepared: UnlearningJob, loaded: LoadedModel, reference: Reference) -> Loss:
    settings, job = prepared.settings, prepared.adapter.job
    assert isinstance(settings, RmuSettings)
    point = _steered(settings, job.layers) + 1
    generator = torch.Generator().manual_seed(settings.seed)
    direction = torch.rand(int(loaded.model.config.hidden_size), generator=generator)
    frozen: dict[Row, Tensor] = {}
    scale: list[float] = []

    def read(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The stream where it is steered; nothing above is computed."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return read_streams(causal_model(model), job.row, inputs, [point])[point]

    def loss(model: Any, batch: dict[str, Any]) -> Terms:
        mask, n = batch["attention_mask"].bool(), batch["forget"]
        hidden = read(model, batch)
        missing = [row for row, key in enumerate(batch["keys"]) if row >= n and key not in frozen]
        if missing or not scale:
            with torch.no_grad(), model.disable_adapter():
                before = read(model, batch)
            if not scale:
                # The first position collects norms a hundred times those of all others and would set the scale alone.
                scale.append(float(before[mask].norm(dim=-1).median()))
            for row in missing:
                frozen[batch["keys"][row]] = before[row, mask[row]].clone()
        target = settings.steering * scale[0] * direction.to(hidden) / direction.norm()
        forget = (hidden[:n][mask[:n]] - target).square().mean()
        before_rows = torch.cat([frozen[key] for key in batch["keys"][n:]])
        retain = (hidden[n:][mask[n:]] - before_rows).square().mean()
        return {"forget": forget, "retain": settings.retain_weight * retain}

    return loss


LOSSES: dict[str, Callable[[UnlearningJob, LoadedModel, Reference], Loss]] = {
    "grad_diff": _grad_diff, "npo": _npo, "simnpo": _simnpo, "rmu": _rmu,
}  # fmt: skip


@torch.no_grad()
def _references(model: Any, examples: Sequence[Example], advance: Callable[[int], None]) -> dict[Row, float]:
    found: dict[Row, float] = {}
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        batch = {key: value.to(model.device) for key, value in example_batch(part).items()}
        nll = sequence_nll(model, batch)
        found |= {example.ids: -float(value) for example, value in zip(part, nll, strict=True)}
        advance(len(part))
    return found


def _steered(settings: RmuSettings, layers: int) -> int:
    return max(0, min(layers - 1, round(settings.steer_layer * layers)))
