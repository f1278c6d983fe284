"""What a search may vary: a range or some choices for each setting, ready for every recipe or given in a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...editing.errors import RequestError

KEYS = ("search", "choices", "log")


@dataclass(frozen=True)
class Dimension:
    """One setting that is varied: between two numbers, or one of some values."""

    low: float | int = 0
    high: float | int = 0
    log: bool = False
    """Whether small and large values are tried alike, by their logarithm."""
    choices: tuple[Any, ...] = ()

    def in_words(self) -> str:
        """As a table shows it."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        whole = " in whole numbers" if isinstance(self.low, int) else ""
        return f"{self.low:g} to {self.high:g}{whole}{', logarithmic' if self.log else ''}"

    def as_json(self) -> dict[str, Any]:
        """Plain data, as a file states it."""
        return {"choices": list(self.choices)} if self.choices else {"search": [self.low, self.high], "log": self.log}


def between(low: float, high: float, *, log: bool = False) -> Dimension:
    """Any number between two, or whole numbers where both are whole."""
    return Dimension(low, high, log)


def among(*choices: Any) -> Dimension:
    """One of some values."""
    return Dimension(choices=choices)


Space = Mapping[str, Dimension]


@dataclass(frozen=True)
class ReadySpace:
    """What a recipe varies where nobody says otherwise."""

    space: Space
    objectives: Mapping[str, tuple[str, ...]]
    """By the kind of a concept."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a search has unless they are given: what every trial would only do again for the record."""
    to_settings: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda values, _: dict(values)
    """Turns values of the space into settings, for a model of so many layers."""
    first: tuple[Mapping[str, Any], ...] = ()
    """Values of the first trials, which are no draws: what is known to do well elsewhere."""


def is_searched(value: Any) -> bool:
    """Whether a setting's value in a file is a range or choices to search."""
    return isinstance(value, dict) and bool({"search", "choices"} & value.keys())


def read_dimension(value: Mapping[str, Any], place: str) -> Dimension:
    """A dimension as files state it: ``{search: [0.1, 2.0], log: true}`` or ``{choices: [4, 8, 16]}``.

    Two numbers under ``search`` are a range; anything else is a list of choices.

    Raises:
        RequestError: It is neither.
    """
    if unknown := sorted(value.keys() - {*KEYS}):
        raise RequestError(f"{place}: unknown key {unknown[0]!r} beside search; keys: {', '.join(KEYS)}")
    listed = value.get("search", value.get("choices"))
    log = value.get("log", False)
    if ("search" in value and "choices" in value) or not isinstance(listed, list) or len(listed) < 2:
        raise RequestError(
            f"{place}: got {dict(value)}; allowed: {{search: [LOW, HIGH]}}, with log: true for a logarithmic range, or"
            " {choices: [A, B, ...]}"
        )
    if not isinstance(log, bool):
        raise RequestError(f"{place}: log is {log!r}; allowed: true, false")
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in listed)
    if "choices" in value or len(listed) != 2 or not numbers:
        if log or not all(isinstance(one, str | int | float | bool) for one in listed):
            raise RequestError(f"{place}: choices are single words or numbers, without log; got {dict(value)}")
        return Dimension(choices=tuple(listed))
    low, high = listed
    if not low < high or (log and low <= 0):
        raise RequestError(
            f"{place}: the range goes from {low} to {high}; the second number must be larger, and with log: true both"
            " above 0"
        )
    return (
        Dimension(low, high, log)
        if isinstance(low, int) and isinstance(high, int)
        else Dimension(float(low), float(high), log)
    )
