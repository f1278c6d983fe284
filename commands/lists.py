"""What ``excise list`` can list. Nothing here imports torch: a list takes no longer than a look."""

from collections.abc import Callable

from ..recipes import RECIPES
from .help import COMMAND_SETTINGS, settings_of

Lines = list[tuple[str, ...]]


def recipes() -> Lines:
    return [(name, recipe.about) for name, recipe in RECIPES.items()]


def measurements() -> Lines:
    from ..eval.measurements import MEASUREMENTS

    return [(name, kind.about) for name, kind in MEASUREMENTS.items()]


def attacks() -> Lines:
    from ..recipes.audit.attacks.table import ATTACKS

    return [(name, attack.about) for name, attack in ATTACKS.items()]


def architectures() -> Lines:
    from ..editing.architectures import ARCHITECTURES

    return [
        (name, ", ".join(sorted({w.pattern.split(".")[-2] if "." in w.pattern else w.pattern for w in row.writers})))
        for name, row in sorted(ARCHITECTURES.items())
    ]


def concepts() -> Lines:
    from ..artifacts.concepts import builtin_concepts, describe_concept

    return [(f"builtin:{name}", describe_concept(name).description) for name in builtin_concepts()]


def models() -> Lines:
    from ..artifacts.models.source import builtin_models

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
