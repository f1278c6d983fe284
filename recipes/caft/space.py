"""What a search varies of concept-ablated fine-tuning. Controls are of the report, so trials leave them out."""

from ..common.search_space import ReadySpace, among, between

READY = ReadySpace(
    {
        "learning_rate": between(2e-4, 4e-3, log=True),
        "components": between(1, 6),
        "directions": among("pairs", "difference_in_means", "linear_probe"),
    },
    {"task": ("multiple_choice.flipped:max", "multiple_choice.intended:max")},
    {"controls": False},
)
