"""What a recipe that measures its edit is asked for, and the request once it was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ...artifacts.checkpoints.export import check_disk, check_editable, required_bytes
from ...artifacts.checkpoints.proof import Proof, check_proved
from ...artifacts.checkpoints.read import ITEM_SIZES, Checkpoint, open_checkpoint
from ...artifacts.concepts import load_concept
from ...artifacts.models.dequantized import check_loadable
from ...artifacts.models.find import find_model
from ...artifacts.models.load import choose_device, choose_dtype, load_tokenizer
from ...artifacts.models.source import ModelSource
from ...editing.architectures import architecture_of, layer_count
from ...editing.edits.base import Plan
from ...editing.wiring.row import Architecture
from ...eval.concept import Concept
from ...eval.items import half_of
from ...eval.measurements.table import workload
from ...eval.model_under_test import EvalSettings
from .budgets import BudgetSettings
from .run_folder import free_folder, refuse_taken


class MeasuredSettings(BudgetSettings):
    """Settings of every recipe that measures what its edit did."""

    flags: ClassVar[tuple[str, ...] | None] = (
        "model",
        "concept",
        "budget",
        "kl_budget",
        "seed",
        "device",
        "dtype",
        "out",
    )

    max_new_tokens: int = Field(24, ge=1, le=4096)
    """Longest reply to measure, in tokens (greedy decoding). More take longer."""
    kl_prompts: int = Field(64, ge=1)
    """Number of neutral prompts, and of retain texts, on which the KL divergence from the base is measured."""
    questions: int = Field(0, ge=0)
    """Most questions, and most retain texts, to measure in each split, drawn at random; 0 takes all. Fewer widen the
    intervals."""
    reference: str | None = None
    """Model that was never trained on the concept (retrained reference), measured beside base and edited."""
    fresh: bool = False
    """Measure the base again instead of reusing what an earlier run measured on the same weights, pack and settings."""
    items: Literal["all", "search", "report"] = "all"
    """Which items are measured: all, or one half of the subjects. A search chooses by the half search, and what it chose
    is measured on the half report."""
    chosen_from: int = Field(0, ge=0)
    """Number of trials of a search that these settings were chosen from; the card says so. `excise pick` sets it."""
    kl_budget: float | None = Field(None, gt=0)
    """Choose the edit's strength so that KL(base || edited) on retain texts is at most this, in nats per token, and at
    least 95% of it. Without it the edit stays as it was learned."""
    max_strength: float = Field(1.0, gt=0, le=64)
    """With kl_budget: the strongest that may be chosen, as a multiple of the edit as it was learned."""

    def measuring(self) -> EvalSettings:
        """How much is measured."""
        return EvalSettings(self.max_new_tokens, self.kl_prompts, self.questions, prompts=self.prompt_format())


@dataclass(frozen=True)
class Job:
    """A request that was checked as far as it can be without reading a weight."""

    recipe: str
    settings: MeasuredSettings
    source: ModelSource
    checkpoint: Checkpoint
    concept: Concept
    row: Architecture
    device: torch.device
    dtype: torch.dtype
    reference: ModelSource | None
    out: Path
    measured: Concept
    """The pack with the items that are measured; training takes ``concept``."""
    proof: Proof | None = None
    """Of a row that was derived: that an edit by it leaves nothing of a direction."""
    read: Mapping[str, ModelSource] = field(default_factory=dict)
    """Further models that the run learns from, by what a message may call them, such as "the teacher"."""

    @property
    def layers(self) -> int:
        return layer_count(self.checkpoint.config)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def check(recipe: str, settings: MeasuredSettings, needed: Sequence[str], *, resume: bool) -> Job:
    """Check names, files and memory before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    concept = load_concept(settings.concept)
    concept.require(recipe, *needed)
    if settings.kl_budget is not None:
        concept.require("kl_budget", "retain")
    out = settings.out or free_folder(recipe)
    if not resume:
        refuse_taken(out)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = find_model(settings.model, to_edit=True)
    checkpoint = open_checkpoint(source.folder)
    row, proof = architecture_of(checkpoint.config), check_proved(checkpoint.config)
    check_loadable(checkpoint, device, dtype)
    measured = concept if settings.items == "all" else half_of(concept, settings.items)
    reference = find_model(settings.reference) if settings.reference else _builtin_reference(settings, concept)
    if settings.template:
        # Whether the templates know these variables; otherwise said only when each model is loaded.
        for one in (source, *([reference] if reference else [])):
            load_tokenizer(one, settings.prompt_format())
    return Job(recipe, settings, source, checkpoint, concept, row, device, dtype, reference, out, measured, proof)


def check_plan(job: Job, plan: Plan) -> None:
    """Check that the declared tensors can be edited and that the result fits the disk."""
    check_editable(job.checkpoint, plan)
    check_disk(job.out, required_bytes(job.checkpoint, plan))


def describe(job: Job, plan: Plan, **more: Any) -> dict[str, Any]:
    """What a run would touch and take."""
    sizes = job.checkpoint.tensors
    elements = sum(tensor.size // ITEM_SIZES[tensor.dtype] for tensor in sizes.values())
    return {
        "recipe": job.recipe,
        "out": str(job.out),
        "base": job.source.describe(),
        "concept": job.concept.ref,
        "made": list(job.concept.made),
        "budget": job.settings.budget_in_words(),
        "row": _row_in_words(job.proof),
        "tensors_to_change": len(plan.declared),
        "tensors": len(sizes),
        "tensor_added": plan.untied,
        "bytes_to_change": sum(sizes[name].size for name in plan.declared),
        "bytes_to_write": job.checkpoint.size,
        "memory_bytes": elements * job.dtype.itemsize,
        "dtype": job.dtype_name,
        "device": str(job.device),
        "items_measured": workload(job.measured, job.settings.measuring()),
        **more,
        "first_tensors": list(plan.declared[:3]),
    }


def derived_row(proof: Proof | None) -> dict[str, Any]:
    """What is recorded of a row that was derived."""
    if proof is None:
        return {}
    kept = {key: getattr(proof, key) for key in ("model_type", "row", "residual", "place", "transformers")}
    return {"architecture": {**kept, "proof": "derived, proved on a small copy"}}


def _row_in_words(proof: Proof | None) -> str:
    if proof is None:
        return "in the table"
    return f"derived, proved on a small copy ({proof.residual:.0e} of a direction is left)"


def _builtin_reference(settings: MeasuredSettings, concept: Concept) -> ModelSource | None:
    if settings.model == "builtin:testbed" and concept.ref == "builtin:potions":
        return find_model("builtin:testbed-reference")
    return None
