"""Fine-tuning of whole weights: which ones are trained, and what was added to them as data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..numerics.fake_quantization import restore
from .base import Plan
from .low_rank import plan_addition


@dataclass(frozen=True)
class Delta:
    """What is added to one stored matrix, in its stored layout."""

    form: ClassVar[str] = "dense"
    values: Float[Tensor, "rows columns"]

    @property
    def height(self) -> int:
        return len(self.values)

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        return torch.add(block, self.values[rows], out=room)


@dataclass(frozen=True)
class DenseUpdate:
    """A fine-tune of whole weights: what is added to which tensors of a model."""

    method: ClassVar[str] = "dense"
    deltas: dict[str, Delta]
    """By tensor name, as modules in memory spell it."""
    model_type: str
    width: int
    layers: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Find each tensor in a checkpoint, before reading any.

        Raises:
            RequestError: The update was learned on another kind of model, or a tensor is not there.
        """
        return plan_addition(self, self.deltas, config, names)


@contextmanager
def weights_trained(model: nn.Module, modules: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """Only the weights of these modules want a gradient, all in fp32, while the context lasts; yields what they were.

    Afterwards the model is what it was, bit for bit.
    """
    parameters = dict(model.named_parameters())
    weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in modules}
    found = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in parameters.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, parameter in parameters.items():
            # In half precision small steps would round to none.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(name in weights)
        yield before
    finally:
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(found[name][0])
            parameter.requires_grad_(found[name][1])
            parameter.grad = None
        restore(weights, before)


@torch.no_grad()
def learned_deltas(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Delta]:
    """What training added to each weight, fp32."""
    now = dict(model.named_parameters())
    return {name: Delta((now[name].float() - old.float()).cpu()) for name, old in before.items()}
