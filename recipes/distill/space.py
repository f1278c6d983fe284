"""What a search of distillation varies where nobody says otherwise."""

from ..common.search_space import ReadySpace, between

READY = ReadySpace(
    {
        "shrink": between(0.3, 0.9),
        "noise": between(0.0, 0.3),
        "learning_rate": between(2e-4, 3e-3, log=True),
        "steps": between(100, 800, log=True),
    },
    {"knowledge": ("forget:min", "kl:min")},
)
