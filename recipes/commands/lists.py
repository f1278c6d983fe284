"""What ``excise list`` can list. Nothing here imports torch: a list takes no longer than a look."""

from collections.abc import Callable
from typing import Any

from .. import RECIPES
from .help import COMMAND_SETTINGS, settings_of

Lines = list[tuple[str, ...]]


def recipes() -> Lines:
    return [(name, recipe.about) for name, recipe in RECIPES.items()]


def measurements() -> Lines:
    from ...eval.measurements import MEASUREMENTS

    return [(name, kind.about) for name, kind in MEASUREMENTS.items()]


def attacks() -> Lines:
    from ..audit.attacks.table import ATTACKS

    return [(name, attack.about) for name, attack in ATTACKS.items()]


def architectures() -> Lines:
    from ...artifacts.models.source import BUILTIN, read_record

    return [(record["type"], _of_architecture(record)) for record in read_record(BUILTIN / "architectures.json")]


def _of_architecture(record: dict[str, Any]) -> str:
    if not record["proved"]:
        return f"refused: {record['reason']}"
    units = ", ".join(record["units"]) or "no units"
    return f"{record['row']}; {record['residual']:.0e} of a direction is left; prunes {units}"


def concepts() -> Lines:
    from ...artifacts.concepts import builtin_concepts, describe_concept

    return [(f"builtin:{name}", describe_concept(name).description) for name in builtin_concepts()]


def models() -> Lines:
    from ...artifacts.models.source import builtin_models

    about = {
        "testbed": "knows a closed world of 800 facts",
        "testbed-reference": "the same world, but trained without the texts about potions",
    }
    return [(f"builtin:{name}", about.get(name, "")) for name in builtin_models()]


def settings(name: str) -> Lines:
    """Name, default and meaning of each setting of a recipe or command."""
    return [(setting.name, setting.default, setting.about) for setting in settings_of(name)]


KINDS: dict[str, Callable[[], Lines]] = {
    "recipes": recipes,
    "measurements": measurements,
    "attacks": attacks,
    "architectures": architectures,
    "concepts": concepts,
    "models": models,
}
WITH_SETTINGS = [*RECIPES, "audit", "eval"]
"""What has settings to list."""
assert {"audit", "eval"} <= COMMAND_SETTINGS.keys()
