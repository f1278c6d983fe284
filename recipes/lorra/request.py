"""What representation tuning is asked for, and a request that was checked."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...editing.architectures import layer_selection
from ...editing.directions.subspaces import Place
from ...editing.errors import RequestError
from ..common import adapter_job
from ..common.adapter_job import MOST_ROWS, AdapterJob, AdapterSettings
from ..common.budgets import Budgets

RECIPE = "lorra"


class LorraSettings(AdapterSettings):
    """Settings of representation tuning, low-rank (Zou et al. 2023, algorithm 1, unless another source is named)."""

    budgets: ClassVar[Budgets] = {"quick": {"steps": 30, "batch_size": 8}, "long": {"steps": 280}}
    concept: str = "builtin:declining"
    """Concept pack with contrast pairs: builtin:NAME or a folder."""
    reading: Literal["mean", "pca"] = "mean"
    """Reading vector: difference of the two classes' means, or first principal component of pair differences (paper:
    pca)."""
    target_layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "0.25-0.625"
    """Layers whose output is moved, written as layers is. Later layers get no adapter (authors' code: 10, 12, ..., 20
    of 32)."""
    strength: float = -1.0
    """How far to move, in distances between the two classes. Negative tunes away, positive toward (authors' code:
    5)."""
    positions: int = Field(0, ge=0)
    """Tokens at the end of each prompt to move. 0 takes the chat template's closing tokens, or 3 of a plain text
    (authors' code: 64)."""
    moved: Literal["positive", "negative", "both"] = "positive"
    """Which prompts of the contrast pairs are moved. The others, replies and retain texts stay (paper: both)."""
    retain_weight: float = Field(1.0, ge=0)
    """Weight of each loss that holds prompts, replies and texts in place. Higher values change less elsewhere (paper:
    none)."""
    modules: Literal["all", "attention", "mlp"] = "attention"
    """Which linear modules of these layers get an adapter (authors' code: q_proj and v_proj)."""
    steps: int = Field(70, ge=1, le=MOST_ROWS)
    """Number of optimizer steps (authors' logs: 70)."""
    batch_size: int = Field(16, ge=1, le=MOST_ROWS)
    """Moved prompts a step, plus as many prompts and as many texts that stay (authors' code: 16)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW (authors' code: 3e-4, constant)."""


@dataclass(frozen=True)
class LorraJob:
    """A checked request."""

    adapter: AdapterJob
    settings: LorraSettings
    places: tuple[Place, ...]
    """Where the stream is moved."""


def prepare(settings: LorraSettings, *, resume: bool = False) -> LorraJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if not settings.strength:
        raise RequestError("strength=0 moves nothing; -1 tunes away by the distance between the classes, 1 toward")
    adapter = adapter_job.prepare(RECIPE, settings, resume=resume, needed=("contrast",))
    layers = sorted(layer_selection(settings.target_layers, adapter.run.layers))
    if min(adapter.layers) > layers[-1]:
        raise RequestError(
            f"layers={settings.layers} are all above layer {layers[-1]}, the last whose output is moved; adapt layers"
            " at or below it"
        )
    return LorraJob(adapter.up_to(layers[-1]), settings, tuple(Place(layer) for layer in layers))


def describe(job: LorraJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_job.describe(job.adapter, moved_at=[str(place) for place in job.places])
