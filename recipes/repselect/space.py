"""What a search of RepSelect varies. Controls are of the report, so trials leave them out."""

from ..common.search_space import ReadySpace, among, between

READY = ReadySpace(
    {
        "adversary_rate": between(0.005, 0.5, log=True),
        "kl_budget": between(0.003, 0.3, log=True),
        "rule": among("soft", "quadratic", "hard"),
        "basis": among("forget", "retain"),
        "scored": among("texts", "answers"),
    },
    {"knowledge": ("forget:min", "kl:min")},
    {"controls": False},
)
