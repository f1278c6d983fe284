"""What a search varies of the unlearning losses: how fast, how wide, and how much the rest weighs."""

from ..common.search_space import ReadySpace, among, between

_SHARED = {"learning_rate": between(2e-4, 8e-3, log=True), "rank": among(4, 8, 16)}
_OBJECTIVES = {"knowledge": ("forget:min", "kl:min")}
READY = ReadySpace({**_SHARED, "retain_weight": between(0.25, 16.0, log=True)}, _OBJECTIVES)
READY_RMU = ReadySpace(
    {**_SHARED, "retain_weight": between(100.0, 5000.0, log=True), "steering": between(1.0, 20.0, log=True)},
    _OBJECTIVES,
)
