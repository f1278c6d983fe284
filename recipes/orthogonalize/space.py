"""What a search varies of an orthogonalization: where the direction is taken, and how strongly each layer loses it."""

from collections.abc import Mapping
from typing import Any

from ..common.search_space import ReadySpace, among, between

SPACE = {
    "depth": between(0.35, 1.0),
    "position": among(-1, -2),
    "variant": among("plain", "projected"),
    "per_layer": among(False, True),
    "peak": between(0.6, 1.5),
    "centre": between(0.2, 1.0),
    "reach": between(0.1, 1.0),
    "edge": between(0.0, 1.0),
    "mlp": between(-0.75, 1.25),
    "embedding": between(-2.0, 1.0),
}
"""``depth``: the layer whose input the direction is taken from, as a share of the depth. The strength is ``peak`` at
``centre``, falls to ``edge`` times that over ``reach``, and is 0 beyond, all three as shares of the depth. ``mlp``: what MLPs
lose, as a share of what attention loses in the same layer. ``embedding``: share removed from the embeddings. Below 0 both
are left alone: MLPs in three of eight, embeddings in two of three draws. With ``per_layer`` each layer loses the direction at
its own output, and ``depth`` says what the embeddings lose."""
START = {
    "depth": 0.6,
    "position": -1,
    "variant": "projected",
    "per_layer": False,
    "peak": 1.0,
    "centre": 0.67,
    "reach": 0.34,
    "edge": 1.0,
    "embedding": -1.0,
}
"""All of a direction from a little past the middle, out of the last two thirds of the layers. In the built-in model the first
third adds half of the divergence and nothing to the effect (docs/measured.md)."""


def settings_of(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The settings of ``excise run orthogonalize`` that these values stand for."""
    # Half the way between two layers at least, so that some layer loses the direction.
    peak, reach = float(values["peak"]), max(float(values["reach"]), 0.51 / max(1, layers - 1))
    strengths = []
    for layer in range(layers):
        distance = abs(layer / max(1, layers - 1) - float(values["centre"])) / reach
        strengths.append(round(peak * (1 + distance * (float(values["edge"]) - 1)), 4) if distance <= 1 else 0.0)
    return {
        "point": round(float(values["depth"]) * layers),
        "position": values["position"],
        "variant": values["variant"],
        "per_layer": values["per_layer"],
        "strength": strengths,
        "mlp_strength": [round(max(0.0, float(values["mlp"])) * strength, 4) for strength in strengths],
        "embedding_strength": round(max(0.0, float(values["embedding"])), 4),
    }


READY = ReadySpace(
    SPACE,
    {"knowledge": ("forget:min", "kl:min"), "behaviour": ("behaviour:min", "kl.replies:min")},
    {"positions": 2},
    settings_of,
    (
        {**START, "mlp": -0.5},
        {**START, "mlp": 1.0},
        {**START, "mlp": 1.0, "depth": 1.0},
        {**START, "mlp": 1.0, "per_layer": True},
    ),
)
