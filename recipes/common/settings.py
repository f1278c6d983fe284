"""Settings of a recipe from a YAML file and ``key=value`` flags, with every mistake found at once."""

import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ...artifacts.upgrade import RENAMED_SETTINGS
from ...editing.errors import RequestError, nearest

T = TypeVar("T", bound=BaseModel)


class Settings(BaseModel):
    """Base of all recipe settings: unknown keys are errors, a docstring under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def load_settings(kind: type[T], file: Path | None, assignments: list[str], flags: dict[str, Any] | None = None) -> T:
    """Fill in a settings class: flags over ``--set`` over the file over defaults.

    Raises:
        RequestError: All unknown keys and bad values, each with its place and the nearest name.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value, place in [*_from_file(file), *_from_assignments(assignments, problems), *_from_flags(flags or {})]:
        values[key], places[key] = value, place
    return _validated(kind, values, places, problems)


def settings_of_call(kind: type[T], values: dict[str, Any], only: Collection[str] | None = None) -> T:
    """Fill in a settings class from the keyword arguments of a Python call.

    Args:
        values: Keyword arguments by name; those that are None take their default.
        only: The keys that the call takes; None takes all.

    Raises:
        RequestError: All unknown keys and bad values, each with the nearest name.
    """
    present = {key: value for key, value in values.items() if value is not None}
    problems = [
        f"{key}={value!r}: is no setting of this function{nearest(key, sorted(only))}; settings:"
        f" {', '.join(sorted(only))}"
        for key, value in present.items()
        if only is not None and key not in only
    ]
    if problems:
        raise RequestError(_all_of(problems))
    return _validated(kind, present, {key: f"{key}={value!r}" for key, value in present.items()}, [])


def _validated(kind: type[T], values: dict[str, Any], places: dict[str, str], problems: list[str]) -> T:
    """The settings, or every problem at once, those found before among them."""
    try:
        made = kind.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, kind, places) for detail in error.errors()]
    if problems:
        raise RequestError(_all_of(list(dict.fromkeys(problems))))
    return made


def _all_of(problems: list[str]) -> str:
    """One is a line of its own."""
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} settings are wrong", *problems])


Assignments = list[tuple[str, Any, str]]
"""Key, value and the place it comes from."""


def _from_file(file: Path | None) -> Assignments:
    return [] if file is None else [(key, value, f"{file.name}:{line}") for key, value, line in _read_yaml(file)]


def _from_assignments(assignments: list[str], problems: list[str]) -> Assignments:
    parsed: Assignments = []
    for text in assignments:
        key, separator, value = text.partition("=")
        if separator and key:
            parsed.append((key, _parse(value, problems, text), f"--set {text}"))
        else:
            problems.append(f"--set {text}: is not key=value")
    return parsed


def _from_flags(flags: dict[str, Any]) -> Assignments:
    return [(key, value, f"--{key.replace('_', '-')}") for key, value in flags.items() if value is not None]


def _explain(detail: Any, kind: type[BaseModel], places: dict[str, str]) -> str:
    key = str(detail["loc"][0])
    place = places.get(key, key)
    if detail["type"] == "missing":
        return f"{key} is missing; give --{key.replace('_', '-')}, or write it into the --config file"
    if detail["type"] == "extra_forbidden":
        if RENAMED_SETTINGS.get(key) in kind.model_fields:
            return (
                f"{place}: {key} is now called {RENAMED_SETTINGS[key]}; write {RENAMED_SETTINGS[key]}={detail['input']}"
            )
        keys = sorted(kind.model_fields)
        return f"{place}: unknown key {key!r}{nearest(key, keys) or '; keys: ' + ', '.join(keys)}"
    return f"{place}: {key}: {_reason(detail, kind)}"


def settings_help(kind: type[BaseModel]) -> list[tuple[str, str, str]]:
    """``(key, default, help)`` of each setting, for the command line; what may be chosen stands at the help's end."""
    table = []
    for name, field in kind.model_fields.items():
        words = _allowed(field.annotation)
        choices = f" One of {', '.join(words)}." if words else ""
        default = "required" if field.is_required() else "" if field.default is None else str(field.default)
        table.append((name, default, " ".join((field.description or "").split()) + choices))
    return table


def _read_yaml(file: Path) -> list[tuple[str, Any, int]]:
    try:
        text = file.read_text(encoding="utf-8")
        # Composed as well as loaded, because only nodes know the lines they come from.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file.name}:{mark.line + 1}" if mark else file.name
        raise RequestError(
            f"{place}: is not YAML ({getattr(error, 'problem', error)}); give lines of 'key: value'"
        ) from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise RequestError(f"{file.name}:1: holds no settings; give lines of 'key: value'")
    return [(key.value, content[key.value], key.start_mark.line + 1) for key, _ in node.value]


def _parse(value: str, problems: list[str], text: str) -> Any:
    try:
        # YAML 1.1 reads 1e-3 as text; pydantic makes it a number.
        return yaml.safe_load(value)
    except yaml.YAMLError:
        problems.append(f"--set {text}: the value is not YAML")
        return None


def _reason(detail: Any, kind: type[BaseModel]) -> str:
    name = str(detail["loc"][0])
    message = str(detail["msg"]).removeprefix("Value error, ")
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    if allowed := _allowed(annotation):
        return f"got {detail['input']!r}{nearest(str(detail['input']), allowed)}; allowed: {', '.join(allowed)}"
    if isinstance(annotation, types.UnionType):
        return f"got {detail['input']!r}; {message}"
    return f"got {detail['input']!r}; {message[0].lower()}{message[1:]}"


def _allowed(annotation: Any) -> list[str]:
    """The words of a setting that is one of some."""
    return (
        [str(word) for word in typing.get_args(annotation)] if typing.get_origin(annotation) is typing.Literal else []
    )
