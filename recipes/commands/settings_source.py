"""Settings read from source code that is parsed and never run, so that help and lists need no torch."""

import ast
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
ROOTS = ("Settings", "BaseModel")
"""Classes that end the search for inherited settings."""


@dataclass(frozen=True)
class Setting:
    """One setting, as ``settings_help`` of the class itself would describe it."""

    name: str
    default: str
    about: str


@dataclass(frozen=True)
class Module:
    """A parsed module of the package."""

    parts: tuple[str, ...]
    """Its path from the package's folder, without the suffix."""
    names: dict[str, ast.stmt]
    """Classes, assignments and imports at its top level, by the name that they define."""


def read_settings(module: str, name: str) -> list[Setting]:
    """The settings of a class, the inherited ones first.

    Args:
        module: As ``importlib`` takes it, e.g. ``excise.recipes.prune``.
        name: Of the class; the module may import it from elsewhere in the package.
    """
    return list(_of_class(_module(tuple(module.split(".")[1:])), name).values())


def _of_class(module: Module, name: str) -> dict[str, Setting]:
    place, node = _lookup(module, name)
    assert place is not None and isinstance(node, ast.ClassDef), f"{name} is no class of {module.parts}"
    settings: dict[str, Setting] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id not in ROOTS:
            settings |= _of_class(place, base.id)
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and not _is_class_variable(field):
            settings[field.target.id] = _setting(place, field.target.id, field, after)
    return settings


def _setting(module: Module, name: str, field: ast.AnnAssign, after: ast.stmt | None) -> Setting:
    about = ""
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        about = " ".join(inspect.cleandoc(after.value.value).split())
    words = _choices(module, field.annotation)
    return Setting(name, _default(module, field.value), about + (f" One of {', '.join(words)}." if words else ""))


def _default(module: Module, value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        arguments = [*value.args, *(keyword.value for keyword in value.keywords if keyword.arg == "default")]
        value = arguments[0] if arguments else None
    if value is None:
        return "required"
    default = _value(module, value)
    return "" if default is None else str(default)


def _value(module: Module, value: ast.expr) -> Any:
    if isinstance(value, ast.Name):
        place, node = _lookup(module, value.id)
        if place is not None and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            return _value(place, node.value)
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _choices(module: Module, annotation: ast.expr) -> list[str]:
    """The words of a Literal, also behind an alias."""
    if isinstance(annotation, ast.Name):
        place, node = _lookup(module, annotation.id)
        if place is not None and isinstance(node, ast.Assign):
            return _choices(place, node.value)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        words = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return [str(ast.literal_eval(word)) for word in words]
    return []


def _is_class_variable(field: ast.AnnAssign) -> bool:
    return isinstance(field.annotation, ast.Subscript) and ast.unparse(field.annotation.value) == "ClassVar"


def _lookup(module: Module, name: str) -> tuple[Module | None, ast.stmt | None]:
    """Where a name of a module is defined, following imports within the package."""
    node = module.names.get(name)
    if not isinstance(node, ast.ImportFrom):
        return module, node
    # An absolute import is of another package.
    if not node.level:
        return None, None
    folder = module.parts[: len(module.parts) - node.level]
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    return _lookup(_module((*folder, *(node.module or "").split("."))), original)


@cache
def _module(parts: tuple[str, ...]) -> Module:
    path = PACKAGE.joinpath(*parts)
    if path.is_dir():
        # A package's own imports start one level further down.
        return _module((*parts, "__init__"))
    names: dict[str, ast.stmt] = {}
    for node in ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return Module(parts, names)
