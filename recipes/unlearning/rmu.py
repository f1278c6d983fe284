"""Representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...artifacts.models.load import LoadedModel
from ...editing.architectures import residual_width
from ...editing.hooks.residual_stream import read_streams
from ...editing.modules import causal_model
from ...editing.training.packing import reading_packed
from ..common.memory_plan import RunMemory
from ..common.tokens import Row
from ..common.trainer import Loss, Terms
from .recipe import UnlearningData, UnlearningJob, UnlearningSettings, describe, learn, memory, pair_batch, prepare, run
from .story import story

__all__ = ["RmuSettings", "describe", "learn", "memory", "prepare", "run", "story"]

SCALE_PAIRS = 16
"""Pairs of sequences that the scale of the stream is read on."""


class RmuSettings(UnlearningSettings):
    """RMU (Li et al. 2024, section 4): ``|h_forget - c u|^2 + alpha |h_retain - h_base|^2`` at one layer, u random."""

    recipe = "rmu"
    averages = "tokens"
    steer_layer: float = Field(0.22, gt=0, le=1)
    """Depth of the layer whose output is steered, as a fraction of all layers; later layers get no adapter (paper:
    layer 7 of 32)."""
    steering: float = Field(6.5, gt=0)
    """c: length of the target vector, in median norms of the base's own activations there. Higher values erase more
    (paper: 6.5)."""
    retain_weight: float = Field(1200.0, ge=0)
    """alpha: weight of the retain loss. Lower values damage other topics; higher values erase less (paper: 1200)."""

    def deepest_layer(self, layers: int) -> int:
        """The steered one."""
        return max(0, min(layers - 1, round(self.steer_layer * layers)))

    def bytes_kept(self, needs: RunMemory, texts: Sequence[str]) -> int:
        """The base's stream on what is retained."""
        return needs.tokens(texts) * needs.sizes.width * needs.sizes.dtype.itemsize

    def loss(self, job: UnlearningJob, loaded: LoadedModel, data: UnlearningData) -> Loss:
        """Section 4."""
        return RmuLoss(self, job, loaded.model, data)


class RmuLoss:
    """Squared distances of the stream after the steered layer: to a random vector, and to where the base has it."""

    def __init__(self, settings: RmuSettings, job: UnlearningJob, base: nn.Module, data: UnlearningData):
        self.settings, self.row = settings, job.adapter.run.row
        # Point l + 1 of the stream is the output of layer l.
        self.point = settings.deepest_layer(job.adapter.run.layers) + 1
        self.base_streams: dict[Row, Tensor] = {}
        """The base's stream on each retain row, read once."""
        width = residual_width(causal_model(base).config.to_dict())
        # Uniform on 0 to 1 as in the authors' code, not normal: all components are positive.
        direction = torch.rand(width, generator=torch.Generator().manual_seed(settings.seed))
        self.target = settings.steering * self._scale(base, data) * direction / direction.norm()
        """Where the stream of forget texts is to go [d]."""

    def __call__(self, model: Any, batch: dict[str, Any]) -> Terms:
        n, keys, hidden = batch["forget"], batch["keys"], self._read(model, batch)
        self._read_base(model, batch)
        of_forget = sum(map(len, keys[:n]))
        forget = (hidden[:of_forget] - self.target.to(hidden)).square().mean()
        base = torch.cat([self.base_streams[key] for key in keys[n:]])
        retain = (hidden[of_forget:] - base).square().mean()
        return {"forget": forget, "retain": self.settings.retain_weight * retain}

    def _read(self, model: nn.Module, batch: dict[str, Any]) -> Float[Tensor, "n d"]:
        """The stream of all tokens where it is steered, sequence after sequence; nothing above is computed."""
        if "blocks" not in batch:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            return self._stream(model, inputs)[inputs["attention_mask"].bool()]
        with reading_packed(batch) as inputs:
            stream = self._stream(model, inputs)[0]
        # As often as sequences share it, and in the batch's order.
        return stream[batch["where"]]

    def _stream(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return read_streams(causal_model(model), self.row, inputs, [self.point])[self.point]

    @torch.no_grad()
    def _scale(self, base: nn.Module, data: UnlearningData) -> float:
        """The median norm of the base's stream, on the first pairs: neither parts of a step nor a resumed run move
        it."""
        batch = pair_batch(*zip(*data.pairs[:SCALE_PAIRS], strict=True))
        device = next(base.parameters()).device
        batch |= {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        # The first position collects norms a hundred times those of all others; the median is not moved by it.
        return float(self._read(base, batch).float().norm(dim=-1).median())

    def _read_base(self, model: Any, batch: dict[str, Any]) -> None:
        """Read the base on retain rows that are new."""
        n, keys = batch["forget"], batch["keys"]
        new = [place for place in range(n, len(keys)) if keys[place] not in self.base_streams]
        if new:
            with torch.no_grad(), model.disable_adapter():
                base = self._read(model, batch).split([len(key) for key in keys])
            for place in new:
                self.base_streams[keys[place]] = base[place].clone()
