"""Choosing which units to prune from their scores, and others to compare them with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Units = dict[int, tuple[int, ...]]
"""Units by layer."""
NEAREST = 10
"""Units that come closest in size, among which a matched one is drawn."""


@dataclass(frozen=True)
class UnitScores:
    """What was seen of all units of one kind."""

    forget: Float[Tensor, "layers units"]
    retain: Float[Tensor, "layers units"]
    size: Float[Tensor, "layers units"]
    """Mean absolute activation on retain sequences."""
    mean: Float[Tensor, "layers units"]
    """Mean activation on retain sequences."""


def combine(scores: UnitScores, retain_weight: float) -> Float[Tensor, "layers units"]:
    """``forget - lambda retain``, each as a share of its own total."""
    return scores.forget / scores.forget.abs().sum().clamp_min(1e-12) - retain_weight * scores.retain / (
        scores.retain.abs().sum().clamp_min(1e-12)
    )


def top_units(scores: Float[Tensor, "layers units"], share: float, *, alike: bool = False) -> Units:
    """Units with the highest scores among all layers, by layer; as many of every layer if ``alike``."""
    if alike:
        best = scores.topk(round(share * scores.shape[1]), dim=1).indices
        return {layer: tuple(sorted(units)) for layer, units in enumerate(best.tolist()) if units}
    count = round(share * scores.numel())
    places = scores.flatten().topk(count).indices.tolist() if count else []
    by_layer: dict[int, list[int]] = {}
    for place in places:
        by_layer.setdefault(place // scores.shape[1], []).append(place % scores.shape[1])
    return {layer: tuple(sorted(units)) for layer, units in sorted(by_layer.items())}


def matched_units(chosen: Units, size: Float[Tensor, "layers units"], generator: torch.Generator) -> Units:
    """For each chosen unit another one of its layer, drawn among the ten that come closest to it in size.

    Where more than half of a layer is chosen there are not as many others; then some of the drawn are chosen ones too.
    """
    matched = {}
    for layer, units in chosen.items():
        ours, picked = set(units), set[int]()
        for unit in units:
            order = (size[layer] - size[layer, unit]).abs().argsort().tolist()
            left = [other for other in order if other not in picked]
            near = ([other for other in left if other not in ours] or left)[:NEAREST]
            picked.add(near[int(torch.randint(len(near), (1,), generator=generator))])
        matched[layer] = tuple(sorted(picked))
    return matched


def in_both(one: Units, other: Units) -> int:
    """How many units two choices share."""
    return sum(len(set(units) & set(other.get(layer, ()))) for layer, units in one.items())
