"""Edit a language model's weights, measure what the edit did, and ship the result.

>>> import excise
>>> run = excise.run("elm", model="builtin:testbed", concept="builtin:potions")  # doctest: +SKIP
>>> run.findings  # doctest: +SKIP

Every name is imported when it is first used, so ``import excise`` is fast and loads no other package.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .artifacts.concepts import load_concept as load_concept
    from .artifacts.reporting.outcomes import Audit as Audit
    from .artifacts.reporting.outcomes import Evaluation as Evaluation
    from .artifacts.reporting.outcomes import Run as Run
    from .editing.errors import CheckpointError as CheckpointError
    from .editing.errors import ConceptError as ConceptError
    from .editing.errors import EditError as EditError
    from .editing.errors import ExciseError as ExciseError
    from .editing.errors import RequestError as RequestError
    from .editing.errors import UnsupportedArchitecture as UnsupportedArchitecture
    from .editing.errors import VerifyError as VerifyError
    from .eval.concept import Concept as Concept
    from .eval.statistics import Measurement as Measurement
    from .recipes.api import AppliedCheckpoint as AppliedCheckpoint
    from .recipes.api import apply as apply
    from .recipes.api import audit as audit
    from .recipes.api import evaluate as evaluate
    from .recipes.api import load_model as load_model
    from .recipes.api import load_run as load_run
    from .recipes.api import run as run
    from .recipes.common.direction_search import Direction as Direction
    from .recipes.concept.api import check_concept as check_concept
    from .recipes.concept.api import get_concept as get_concept
    from .recipes.concept.api import make_concept as make_concept
    from .recipes.in_memory import AppliedEdit as AppliedEdit
    from .recipes.in_memory import find_direction as find_direction
    from .recipes.in_memory import orthogonalize as orthogonalize
    from .recipes.looks import compare as compare
    from .recipes.looks import diff as diff
    from .recipes.looks import inspect as inspect
    from .recipes.looks import localize as localize
    from .recipes.looks import meta as meta
    from .recipes.looks import verify as verify
    from .recipes.relearning_monitor import RelearningMonitor as RelearningMonitor
    from .recipes.suites.figures import SuiteTable as SuiteTable

__version__ = "0.1.0"

_HOMES = {
    "AppliedCheckpoint": "recipes.api",
    "AppliedEdit": "recipes.in_memory",
    "Audit": "artifacts.reporting.outcomes",
    "CheckpointError": "editing.errors",
    "Concept": "eval.concept",
    "ConceptError": "editing.errors",
    "Direction": "recipes.common.direction_search",
    "EditError": "editing.errors",
    "Evaluation": "artifacts.reporting.outcomes",
    "ExciseError": "editing.errors",
    "Measurement": "eval.statistics",
    "RelearningMonitor": "recipes.relearning_monitor",
    "RequestError": "editing.errors",
    "Run": "artifacts.reporting.outcomes",
    "SuiteTable": "recipes.suites.figures",
    "UnsupportedArchitecture": "editing.errors",
    "VerifyError": "editing.errors",
    "apply": "recipes.api",
    "audit": "recipes.api",
    "check_concept": "recipes.concept.api",
    "compare": "recipes.looks",
    "diff": "recipes.looks",
    "evaluate": "recipes.api",
    "find_direction": "recipes.in_memory",
    "get_concept": "recipes.concept.api",
    "inspect": "recipes.looks",
    "load_concept": "artifacts.concepts",
    "load_model": "recipes.api",
    "load_run": "recipes.api",
    "localize": "recipes.looks",
    "make_concept": "recipes.concept.api",
    "meta": "recipes.looks",
    "orthogonalize": "recipes.in_memory",
    "run": "recipes.api",
    "verify": "recipes.looks",
}
"""Public names, and the module that each is imported from when it is first used."""

__all__ = [*_HOMES, "__version__"]

if not TYPE_CHECKING:
    # A type checker that saw this function would accept any name.
    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import warnings
        from importlib import import_module

        with warnings.catch_warnings():
            # What tqdm says in a notebook without ipywidgets; excise draws no bars there.
            warnings.filterwarnings("ignore", message="IProgress not found")
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
