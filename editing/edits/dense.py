"""Fine-tuning of whole weight matrices: select which are trained, and store what training added to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..wiring.experts import StoredPiece
from .base import Plan
from .fake_quantization import restore
from .low_rank import Addend, Update, plan_addition


@dataclass(frozen=True)
class Delta:
    """The addend of one stored matrix, in its stored layout, or of all experts' matrices of a fused parameter."""

    form: ClassVar[str] = "dense"
    values: Float[Tensor, "*experts rows columns"]

    @property
    def height(self) -> int:
        return int(self.values.shape[-2])

    @property
    def width(self) -> int:
        return int(self.values.shape[-1])

    @property
    def matrices(self) -> int:
        return len(self.values) if self.values.dim() == 3 else 1

    def addend(self, matrix: int) -> Addend:
        return Delta(self.values[matrix]) if self.values.dim() == 3 else self

    def piece(self, piece: StoredPiece) -> Update:
        return Delta(piece.of(self.values))

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        return torch.add(block, self.values[rows], out=room)


@dataclass(frozen=True)
class DenseUpdate:
    """A fine-tune of whole weights: the addend of each changed tensor."""

    method: ClassVar[str] = "dense"
    deltas: dict[str, Delta]
    """By the parameter's name in memory; a checkpoint may spell it without a prefix."""
    model_type: str
    width: int
    layers: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Find each tensor in a checkpoint, before reading any.

        Raises:
            RequestError: The update was learned on another kind of model, or a tensor is missing.
        """
        return plan_addition(self, self.deltas, config, names)


@contextmanager
def weights_trained(model: nn.Module, modules: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """Train only the weights of these modules, with all parameters in fp32, while the context lasts.

    Yields copies of the weights from before. On exit the model is restored bit for bit.

    Args:
        model: The model whose parameters change.
        modules: Names of linear modules, without ``.weight``, or of parameters.

    Raises:
        EditError: A weight could not be restored.
    """
    parameters = dict(model.named_parameters())
    names = [name if name in parameters else f"{name}.weight" for name in modules]
    weights = {name: parameters[name] for name in names}
    original = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in parameters.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, parameter in parameters.items():
            # In half precision small optimizer steps would round to zero.
            # Set through ``data``, so that the parameter stays the same object and tied modules stay tied.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(name in weights)
        yield before
    finally:
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(original[name][0])
            parameter.requires_grad_(original[name][1])
            # A gradient that stays would hold memory, and the next training would add to it.
            parameter.grad = None
        restore(weights, before)


@torch.no_grad()
def learned_deltas(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Delta]:
    """What training added to each weight, in fp32 on the CPU; ``before`` is what ``weights_trained`` yielded."""
    now = dict(model.named_parameters())
    return {name: Delta((now[name].float() - old.float()).cpu()) for name, old in before.items()}
