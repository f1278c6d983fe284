"""Settings of a recipe from a YAML file and ``key=value`` flags, with every mistake found at once."""

import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from ...artifacts.files.opened import Unreadable, located
from ...artifacts.files.parsed import DECIMAL, parse_yaml, read_settings_lines
from ...artifacts.upgrade import RENAMED_SETTINGS
from ...editing.errors import RequestError, nearest, one_line

T = TypeVar("T", bound=BaseModel)


LARGEST = 2**31 - 1
"""The largest whole number that a setting may have; most settings have a bound of their own."""


class Settings(BaseModel):
    """Base of all recipe settings: unknown keys are errors, a docstring under a field is its help."""

    flags: ClassVar[tuple[str, ...] | None] = None
    """Settings that have a flag of their own in the command; the others are given by ``--set``. None: all have one."""
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers are decimal: pydantic would take ``0-3`` for -3, ``1_0`` for 10 and ``yes`` for 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str) and "\0" in one:
                raise ValueError("the text holds a zero byte")
            if kinds & {int, float} and bool not in kinds:
                _check_number(one, kinds)
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types, and the words, that an annotation allows somewhere."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(parts[0])
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _check_number(value: Any, kinds: set[Any]) -> None:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    if isinstance(value, str) and value not in kinds and str not in kinds and not DECIMAL.fullmatch(value):
        raise ValueError("write a decimal number, such as 12, 0.5 or 1e-3")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"at most {LARGEST} is allowed")


def load_settings(
    kind: type[T],
    file: Path | None,
    assignments: list[str],
    flags: dict[str, Any] | None = None,
    aside: Callable[[str, Any, str], bool] = lambda *_: False,
) -> T:
    """Fill in a settings class: flags over ``--set`` over the file over defaults.

    Args:
        aside: Called with key, value and place of each; whether it takes the value for itself.

    Raises:
        RequestError: All unknown keys and bad values, each with its place and the nearest name.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value, place in [*_from_file(file), *_from_assignments(assignments, problems), *_from_flags(flags or {})]:
        if aside(key, value, place):
            continue
        _put(kind, values, places, key, value, place)
    return _validated(kind, values, places, problems)


def _put(
    kind: type[BaseModel], values: dict[str, Any], places: dict[str, str], key: str, value: Any, place: str
) -> None:
    """Set a key; ``template.NAME`` sets one entry of a setting that is a table of names and values."""
    table, dot, name = key.partition(".")
    field = kind.model_fields.get(table)
    if dot and name and field is not None and typing.get_origin(field.annotation) is dict:
        before = values.get(table)
        values[table] = {**(before if isinstance(before, dict) else {}), name: value}
        places[table] = place
        return
    values[key], places[key] = value, place


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
        # One line a setting: where several types are allowed, each says why it does not fit.
        first = {detail["loc"][:1]: detail for detail in reversed(error.errors())}
        problems += [_explain(detail, kind, places) for detail in reversed(first.values())]
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
        if not separator or not key:
            problems.append(f"--set {text:.200}: is not key=value")
            continue
        try:
            parsed.append((key, parse_yaml(value), f"--set {text}"))
        except Unreadable as error:
            problems.append(f"--set {text:.200}: the value cannot be read: {error}")
    return parsed


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command that reads them back.

    Example:
        >>> as_flags({"layers": "4-7", "rank": 8})
        ['--set', 'layers=4-7', '--set', 'rank=8']
    """
    # JSON is YAML too, so ``--set`` reads such a value back.
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [word for key, value in said.items() for word in ("--set", f"{key}={value}")]


def _from_flags(flags: dict[str, Any]) -> Assignments:
    return [(key, value, f"--{key.replace('_', '-')}") for key, value in flags.items() if value is not None]


def _explain(detail: Any, kind: type[BaseModel], places: dict[str, str]) -> str:
    # A rule about several settings has no place of its own.
    key = str(detail["loc"][0]) if detail["loc"] else "settings"
    place = f"{places.get(key, key):.200}"
    if detail["type"] == "missing":
        flags = getattr(kind, "flags", None)
        flag = f"--{key.replace('_', '-')}" if flags is None or key in flags else f"--set {key}=VALUE"
        return f"{key} is missing; give {flag}, or write it into the --config file"
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
        return read_settings_lines(file)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({one_line(error)}); give a YAML file") from error
    except Unreadable as error:
        raise RequestError(f"{located(file.name, error)}; give lines of 'key: value'") from error


def _reason(detail: Any, kind: type[BaseModel]) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else ""
    message = str(detail["msg"]).removeprefix("Value error, ")
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    # A choice that may be left out is a union with None.
    if allowed := _allowed(annotation) or [word for part in typing.get_args(annotation) for word in _allowed(part)]:
        return f"got {detail['input']!r:.80}{nearest(str(detail['input']), allowed)}; allowed: {', '.join(allowed)}"
    if detail["input"] is None:
        return f"it has no value; {message[0].lower()}{message[1:]}"
    if isinstance(annotation, types.UnionType):
        return f"got {detail['input']!r:.80}; {message}"
    return f"got {detail['input']!r:.80}; {message[0].lower()}{message[1:]}"


def _allowed(annotation: Any) -> list[str]:
    """The words of a setting that is one of some."""
    return (
        [str(word) for word in typing.get_args(annotation)] if typing.get_origin(annotation) is typing.Literal else []
    )
