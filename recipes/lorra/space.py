"""What a search varies of representation tuning."""

from ..common.search_space import ReadySpace, among, between

READY = ReadySpace(
    {
        "strength": between(-2.5, -0.3),
        "learning_rate": between(2e-4, 4e-3, log=True),
        "rank": among(4, 8, 16),
        "retain_weight": between(0.25, 4.0, log=True),
    },
    {"knowledge": ("forget:min", "kl:min"), "behaviour": ("behaviour:min", "kl.replies:min")},
)
