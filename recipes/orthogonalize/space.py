"""What a search varies of an orthogonalization: where the direction is taken, and how strongly each layer loses it."""

from collections.abc import Mapping
from typing import Any

from ..common.search_space import ReadySpace, among, between

SPACE = {
    "depth": between(0.15, 0.85),
    "position": among(-1, -2),
    "peak": between(0.4, 1.5),
    "centre": between(0.2, 1.0),
    "reach": between(0.1, 1.0),
    "edge": between(0.0, 1.0),
    "embedding": between(-0.5, 1.0),
}
"""``depth``: the layer whose input the direction is taken from, as a share of the depth. The strength is ``peak`` at
``centre``, falls to ``edge`` times that over ``reach``, and is 0 beyond, all three as shares of the depth. ``embedding``: share
removed from the embeddings; below 0 they are left alone, as in a third of what is drawn at random."""


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
        "strength": strengths,
        "embedding_strength": round(max(0.0, float(values["embedding"])), 4),
    }


READY = ReadySpace(
    SPACE,
    {"knowledge": ("forget:min", "kl:min"), "behaviour": ("behaviour:min", "kl.replies:min")},
    {"positions": 2},
    settings_of,
)
