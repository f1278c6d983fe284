"""What a search varies of ELM."""

from ..common.search_space import ReadySpace, among, between

READY = ReadySpace(
    {
        "learning_rate": between(5e-4, 8e-3, log=True),
        "rank": among(4, 8, 16),
        "retain_weight": between(2.0, 64.0, log=True),
        "strength": between(1.0, 16.0, log=True),
        "layers": among("all", "0-0.5", "0.25-0.75"),
    },
    {"knowledge": ("forget:min", "kl:min")},
)
