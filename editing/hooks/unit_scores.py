"""Scores of units (MLP neurons and attention heads), from streaming sums, so that no activation is stored.

A unit's activation is the input of its layer's last matrix (``Architecture.mlp_units`` or ``attention_units``).

Example:
    >>> concept = UnitMoments(layers=len(decoder_layers(model, row)))
    >>> with unit_inputs(model, row.mlp_units, row, lambda layer, x: concept.see(layer, x, mask)):
    ...     model(**batch)
    >>> scores = selectivity(concept, rest)  # rest: the same on other texts
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..numerics.wide import in_float64
from ..wiring.row import Architecture
from .residual_stream import RowsAndPositions, decoder_layers

EPSILON = 1e-5
"""Added to the denominator of selectivity, against division by 0."""
BUCKET = 100
"""Number of consecutive ranks that get the same saliency (Lo et al. 2024, as in their code)."""


@contextmanager
def unit_inputs(model: nn.Module, module: str, row: Architecture, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, activations)`` with the input [batch, positions, units] of a module in every layer."""
    with ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(model, row)):
            places = RowsAndPositions(layer)
            hooks.callback(places.remove)

            def read(_: nn.Module, args: Any, index: int = index, places: RowsAndPositions = places) -> Any:
                values = places.of(args[0])
                see(index, values)
                # What was seen is what is read, so that a gradient comes by where it is looked for.
                return None if values is args[0] else (values.view_as(args[0]), *args[1:])

            hooks.callback(layer.get_submodule(module).register_forward_pre_hook(read).remove)
        yield


@dataclass
class UnitMoments:
    """Streaming mean, variance and mean absolute value of every unit of every layer, in float64."""

    layers: int
    count: float = 0.0
    total: Float[Tensor, "layers units"] | None = None
    squares: Float[Tensor, "layers units"] | None = None
    sizes: Float[Tensor, "layers units"] | None = None
    _pending: dict[int, Float[Tensor, "n units"]] = field(default_factory=dict, repr=False)

    def see(
        self, layer: int, activations: Float[Tensor, "batch positions units"], mask: Bool[Tensor, "batch positions"]
    ) -> None:
        """Add one layer of a batch to the sums; positions outside the mask are ignored."""
        values = in_float64(activations.detach()[mask.to(activations.device)])
        if self.total is None or self.squares is None or self.sizes is None:
            shape = (self.layers, values.shape[-1])
            self.total, self.squares, self.sizes = (
                torch.zeros(shape, dtype=torch.float64, device=values.device) for _ in range(3)
            )
        # Layers may lie on several devices.
        values = values.to(self.total.device)
        self.total[layer] += values.sum(0)
        self.squares[layer] += values.square().sum(0)
        self.sizes[layer] += values.abs().sum(0)
        # Every layer sees the same positions, so one of them counts.
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
        # The difference cancels where the mean is large. Sums in float64 leave enough digits, and rounding may end
        # below 0.
        return (self.squares / max(self.count, 1) - self.mean.square()).clamp_min(0)


@dataclass
class UnitAttribution:
    """Streaming sums of activation times gradient: the change of a loss when a unit is removed, to first order.

    Source: Molchanov et al. 2017, section 2.2. Replacing a unit by its mean instead of 0 is an addition.
    """

    layers: int
    product: Float[Tensor, "layers units"] | None = None
    gradient: Float[Tensor, "layers units"] | None = None

    def see(self, layer: int, activations: Float[Tensor, "batch positions units"]) -> None:
        """Register one layer of a batch; the backward pass then adds to the sums."""
        # A forward without gradients has no backward pass that could add anything.
        if not activations.requires_grad:
            return
        values = activations.detach()

        def backward(gradient: Tensor) -> None:
            product, total = (in_float64(addend).sum((0, 1)) for addend in (values * gradient, gradient))
            if self.product is None or self.gradient is None:
                self.product, self.gradient = (product.new_zeros(self.layers, len(product)) for _ in range(2))
            self.product[layer] += product.to(self.product.device)
            self.gradient[layer] += total.to(self.gradient.device)

        activations.register_hook(backward)

    def effect(self, mean: Float[Tensor, "layers units"] | None = None) -> Float[Tensor, "layers units"]:
        """Change of the summed loss, in nats, if each unit alone were set to 0, or to its mean if ``mean`` is given."""
        assert self.product is not None and self.gradient is not None
        # The sum of (activation - mean) times gradient, without the activations themselves.
        return -(self.product if mean is None else self.product - mean.to(self.gradient) * self.gradient)


def mean_difference(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Standardized difference in means: d' with the pooled standard deviation (Cohen 1988). No unit; 0 means none."""
    pooled = ((concept.variance + rest.variance) / 2).sqrt()
    return (concept.mean - rest.mean) / pooled.clamp_min(1e-12)


def selectivity(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Ratio of mean absolute activations (Pochinkov and Schoots 2024, section 3); 1 means no difference."""
    return concept.size / (rest.size + EPSILON)


def rank_saliency(concept: UnitMoments, rest: UnitMoments) -> Float[Tensor, "layers units"]:
    """Concept saliency of Lo et al. 2024: bucketed rank of ``|mean difference|`` among all units, from 1 (largest) to
    0.

    A relative score: half of all units are above 0.5 in every model, whether it knows the concept or not.
    """
    scores = (concept.mean - rest.mean).abs().flatten()
    ranks = torch.empty_like(scores)
    # Stable, so that units with equal scores are ranked alike in every run.
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(
        len(scores), dtype=scores.dtype, device=scores.device
    )
    bucket = ranks.div(BUCKET, rounding_mode="floor") + 1
    most = max(len(scores) / BUCKET, 1.0)
    saliency: Tensor = ((most - bucket) / max(most - 1, 1e-9)).clamp(0, 1)
    return saliency.reshape(concept.mean.shape)


def rank_correlation(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, -1 to 1; NaN for fewer than three values, and where all of one side are equal."""
    if len(first) < 3:
        return float("nan")
    return float(torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1])


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks in float64; equal values share the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (in_float64(counts.cumsum(0)) - in_float64(counts - 1) / 2)[places.cpu()]


def by_head(scores: Float[Tensor, "layers columns"], width: int) -> Float[Tensor, "layers heads"]:
    """Sum of the scores over each head's ``width`` columns."""
    return scores.unflatten(-1, (-1, width)).sum(-1)


@contextmanager
def gradients_reach_units(model: Any) -> Iterator[None]:
    """Give gradients to activations but to no weight, by requiring them at the output of the embedding."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
