"""What a search varies of pruning. Controls and validation are of the report, so trials leave them out."""

from ..common.search_space import ReadySpace, among, between

READY = ReadySpace(
    {
        "share": between(0.005, 0.3, log=True),
        "retain_weight": between(0.0, 4.0),
        "score": among("attribution", "mean_attribution", "selectivity"),
    },
    {"knowledge": ("forget:min", "kl:min")},
    {"controls": False, "validate_units": 0},
)
