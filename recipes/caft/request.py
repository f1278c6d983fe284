"""What concept-ablated fine-tuning is asked for, and a request that was checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ...editing.directions.sae_latents import SparseLatents
from ...editing.directions.subspaces import Place, Site, Subspace
from ...editing.hooks.concept_ablation import Mode, Value
from ..common.adapter_job import MOST_ROWS, AdapterJob, AdapterSettings
from ..common.budgets import Budgets
from ..data.datasets import TuningData
from .sae_latent_scores import Score

Directions = Literal["pairs", "difference_in_means", "mass_mean", "linear_probe", "leace", "finetuned", "sae", "none"]


class CaftSettings(AdapterSettings):
    """Settings of concept-ablated fine-tuning (Casademunt et al. 2025)."""

    budgets: ClassVar[Budgets] = {
        "quick": {"steps": 60, "watch": 16, "controls": False},
        "long": {"steps": 1000, "watch": 128},
    }
    concept: str = "builtin:shortcut"
    """Task pack: what is measured and, unless data is given, what is trained: builtin:NAME or a folder."""
    data: str | None = None
    """What to fine-tune on: a file, a folder, or hub:ORG/NAME[:CONFIGURATION][:SPLIT]; the pack's train.jsonl where
    none is given."""
    data_map: str | None = None
    """Columns of data of unknown form: question=COLUMN,answer=COLUMN or text=COLUMN."""
    directions: Directions = "pairs"
    """Where directions come from: the pack's contrast pairs, what an unablated fine-tune changes (paper), or an
    autoencoder (paper)."""
    directions_file: Path | None = None
    """A directions.safetensors to use instead."""
    sae: Path | None = None
    """Folder of a sparse autoencoder (sae_lens, dictionary_learning, sparsify, Gemma Scope or Llama Scope), for
    directions=sae."""
    latents: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Latents of it to ablate, where the autoencoder itself says; where none are named, the first ``components`` by
    ``score``."""
    score: Score = "contrast"
    """What latents are ranked by: how much more they write in one member of the contrast pairs, or their attribution to
    the loss (paper)."""
    remove: Literal["span", "latents"] = "span"
    """What goes of an autoencoder's latents: their span, whatever fires (paper), or each as far as it fires (SHIFT)."""
    ablated_layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "0"
    """Layers whose stream loses the directions: a number, a range such as 2-5, fractions of depth, or all."""
    site: Site = "input"
    """Where in those layers: input, output, attention or mlp (paper: output)."""
    components: int = Field(2, ge=1)
    """Directions a place to look at, where the source gives several (paper: 20, of which people picked)."""
    pick: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Which of those to ablate, by index; all where none are named."""
    mode: Mode = "both"
    """both also takes the directions out of the gradient (paper); activations and gradients do one of the two."""
    value: Value = "zero"
    """What an activation has along the directions while training: zero (paper) or the mean it had."""
    watch: int = Field(64, ge=0)
    """Sequences, and contrast pairs, on which the stream is watched while training, at steps 1, 2, 4, ...; 0 does not
    look."""
    controls: bool = True
    """Also train without ablation, with as many random directions, and, where some were picked, with as many of the
    highest score; all
    from the same seed, measured on the same items."""
    steps: int = Field(250, ge=1, le=MOST_ROWS)
    """Optimizer steps of the fine-tuning."""
    batch_size: int = Field(16, ge=1, le=MOST_ROWS)
    """Sequences a step (paper: 16)."""
    tune: Literal["lora", "full"] = "lora"
    """Train an adapter, or the whole weights of the chosen modules (paper: LoRA)."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW; a tenth of it where tune=full and none is given."""


@dataclass(frozen=True)
class CaftJob:
    """A checked request."""

    adapter: AdapterJob
    settings: CaftSettings
    data: TuningData
    places: tuple[Place, ...]
    directions: tuple[Subspace, ...] = ()
    """Directions of a file."""
    latents: SparseLatents | None = None
    """Of an autoencoder: those that were named, or all, to choose from."""
