"""Scores of units, each from streaming sums: no activation is ever kept.

Sites are the inputs of each layer's last matrices (``Architecture.mlp_units`` and ``attention_units``).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..architectures import Architecture
from .residual_stream import decoder_layers

EPSILON = 1e-5
BUCKET = 100
"""Ranks that share one saliency (Lo et al. 2024, as implemented)."""


@contextmanager
def unit_inputs(model: nn.Module, module: str, row: Architecture, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, activations)`` with what a module of each layer reads [batch, positions, units]."""
    with ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(model, row)):
            hooks.callback(
                layer.get_submodule(module).register_forward_pre_hook(lambda _, args, i=index: see(i, args[0])).remove
            )
        yield


@dataclass
class UnitMoments:
    """Streaming mean, variance and mean size of every unit of every layer, in float64."""

    layers: int
    count: float = 0.0
    total: Float[Tensor, "layers units"] | None = None
    squares: Float[Tensor, "layers units"] | None = None
    sizes: Float[Tensor, "layers units"] | None = None
    _pending: dict[int, Float[Tensor, "n units"]] = field(default_factory=dict, repr=False)

    def see(
        self, layer: int, activations: Float[Tensor, "batch positions units"], mask: Bool[Tensor, "batch positions"]
    ) -> None:
        """Take in one layer of a batch; positions outside the mask do not count."""
        values = activations.detach()[mask].double()
        if self.total is None or self.squares is None or self.sizes is None:
            shape = (self.layers, values.shape[-1])
            self.total, self.squares, self.sizes = (
                torch.zeros(shape, dtype=torch.float64, device=values.device) for _ in range(3)
            )
        self.total[layer] += values.sum(0)
        self.squares[layer] += values.square().sum(0)
        self.sizes[layer] += values.abs().sum(0)
        if layer == 0:
            self.count += len(values)

    @property
    def mean(self) -> Float[Tensor, "layers units"]:
        assert self.total is not None
        return self.total / max(self.count, 1)

    @property
    def size(self) -> Float[Tensor, "layers units"]:
        """Mean absolute activation."""
        assert self.sizes is not None
        return self.sizes / max(self.count, 1)

    @property
    def variance(self) -> Float[Tensor, "layers units"]:
        assert self.squares is not None
        return (self.squares / max(self.count, 1) - self.mean.square()).clamp_min(0)


@dataclass
class UnitAttribution:
    """Streaming activation times gradient: to first order, what a unit's removal does to a loss.

    Source: Molchanov et al. 2017, section 2.2; ``mean`` removes the unit's mean instead of zeroing it.
    """

    layers: int
    product: Float[Tensor, "layers units"] | None = None
    gradient: Float[Tensor, "layers units"] | None = None

    def see(self, layer: int, activations: Float[Tensor, "batch positions units"]) -> None:
        """Watch one layer of a batch; its backward pass brings the gradient."""
        if not activations.requires_grad:
            return
        values = activations.detach()

        def backward(gradient: Tensor) -> None:
            if self.product is None or self.gradient is None:
                shape = (self.layers, values.shape[-1])
                self.product, self.gradient = (
                    torch.zeros(shape, dtype=torch.float64, device=values.device) for _ in range(2)
                )
            self.product[layer] += (values * gradient).double().sum((0, 1))
            self.gradient[layer] += gradient.double().sum((0, 1))

        activations.register_hook(backward)

    def effect(self, mean: Float[Tensor, "layers units"] | None = None) -> Float[Tensor, "layers units"]:
        """Change of the summed loss, in nats, if each unit alone became zero, or its mean where one is given."""
        assert self.product is not None and self.gradient is not None
        return -(self.product if mean is None else self.product - mean * self.gradient)


def mean_difference(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Standardized difference in means, d' with the pooled deviation (Cohen 1988)."""
    pooled = ((concept.variance + rest.variance) / 2).sqrt()
    return (concept.mean - rest.mean) / pooled.clamp_min(1e-12)


def selectivity(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Ratio of mean sizes (Pochinkov and Schoots 2024, section 3)."""
    return concept.size / (rest.size + EPSILON)


def rank_saliency(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Concept saliency of Lo et al. 2024: the bucketed rank of ``|mean difference|`` among all units, 1 to 0.

    It is relative: half of all units lie above 0.5 whatever a model knows.
    """
    scores = (concept.mean - rest.mean).abs().flatten()
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(
        len(scores), dtype=scores.dtype, device=scores.device
    )
    bucket = ranks.div(BUCKET, rounding_mode="floor") + 1
    most = max(len(scores) / BUCKET, 1.0)
    found: Tensor = ((most - bucket) / max(most - 1, 1e-9)).clamp(0, 1)
    return found.reshape(concept.mean.shape)


def rank_correlation(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """Spearman's; undefined for fewer than three values."""
    if len(one) < 3:
        return float("nan")
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def by_head(scores: Float[Tensor, "layers columns"], width: int) -> Float[Tensor, "layers heads"]:
    """Sums over each head's columns."""
    return scores.unflatten(-1, (-1, width)).sum(-1)


@contextmanager
def gradients_reach_units(model: Any) -> Iterator[None]:
    """Let the embeddings want gradients, so that activations have some while no weight does."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
