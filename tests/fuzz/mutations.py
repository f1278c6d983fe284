"""Ways to damage a file: bytes are cut and flipped, values replaced, keys doubled, numbers made huge."""

import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from excise.artifacts.files.written import CHECKSUM, sealed

VALUES = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 10**12, -(10**30), 1e308, "", "x", "-1", "nan", "0-3", "\u0000", "é" * 300,
    "../..", [], {}, [[]], [1, "a"], {"a": 1}, [None], ["x"] * 3, "builtin:potions", "/dev/zero",
]  # fmt: skip
"""Values of other types, and out of every range."""
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 300, '"\\ud800"', "0x10", "", "\x00"]
"""Text in place of a value."""
HOLE = "@@hole@@"


class Mutation(NamedTuple):
    """One way to damage a file."""

    kind: str
    about: str
    change: Callable[[bytes], bytes]


def of_bytes(draw: random.Random, data: bytes) -> Mutation:
    """Cut, flip, insert, remove or repeat bytes."""
    kind = draw.choice(["cut", "flip", "flip", "insert", "remove", "repeat", "zero"])
    # The beginnings of files decide most.
    place = draw.randrange(min(len(data), draw.choice([16, 400, 1 << 40])) or 1)
    some = draw.randbytes(draw.choice([1, 1, 2, 8]))
    size = draw.choice([1, 4, 8, 100])
    changes: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda d: d[:place],
        "flip": lambda d: d[:place] + some + d[place + len(some) :],
        "insert": lambda d: d[:place] + some + d[place:],
        "remove": lambda d: d[:place] + d[place + size :],
        "repeat": lambda d: d[:place] + d[place : place + size] * 3 + d[place + size :],
        "zero": lambda d: d[:place] + bytes(len(d[place : place + 8])) + d[place + 8 :],
    }
    return Mutation(kind, f"{kind} at {place} ({some.hex()}, {size})", changes[kind])


def of_json(draw: random.Random, data: bytes) -> Mutation:
    """Replace, remove or double one value of a JSON text, or of one of its lines."""
    lines = data.decode().split("\n")
    numbers = [number for number, line in enumerate(lines) if line.strip()]
    several = len(numbers) > 1 and all(_is_json(lines[number]) for number in numbers[:2])
    number = draw.choice(numbers) if several else -1
    content = json.loads(lines[number] if several else data)
    kind, about, text = _changed(draw, content)

    def change(before: bytes) -> bytes:
        if not several:
            return text.encode("utf-8", "surrogatepass")
        rest = before.decode().split("\n")
        rest[number : number + 1] = [text]
        return "\n".join(rest).encode("utf-8", "surrogatepass")

    return Mutation(kind, f"line {number + 1}: {about}" if several else about, change)


def of_safetensors(draw: random.Random, data: bytes) -> Mutation:
    """Replace a value in the header; the data stay."""
    length = int.from_bytes(data[:8], "little")
    kind, about, text = _changed(draw, json.loads(data[8 : 8 + length]))
    header = text.encode("utf-8", "surrogatepass")
    return Mutation(
        kind, f"header {about}", lambda before: len(header).to_bytes(8, "little") + header + before[8 + length :]
    )


def of_sealed(draw: random.Random, data: bytes) -> Mutation:
    """Replace a value of a sealed object, and seal it again: what stands behind the checksum is checked as well."""
    content = json.loads(data)
    if not isinstance(content, dict):
        return of_json(draw, data)
    kind, about, text = _changed(draw, {key: value for key, value in content.items() if key != CHECKSUM})
    try:
        resealed = sealed(json.loads(text)).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        resealed = text.encode("utf-8", "surrogatepass")
    return Mutation(kind, f"sealed again, {about}", lambda _: resealed)


def of_words(draw: random.Random, data: bytes) -> Mutation:
    """Replace one word or number of a text."""
    places = list(re.finditer(rb"[\w.:-]+", data)) or [re.match(b"", data)]
    place = draw.choice(places)
    assert place is not None
    value = draw.choice(
        [*RAW, *(json.dumps(value) for value in VALUES), "1:30", "yes", "&a b", "*a", "!!set {a}", "- a"]
    )
    start, end = place.span()
    return Mutation("word", f"{place[0]!r} becomes {value[:40]!r}", lambda d: d[:start] + value.encode() + d[end:])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _changed(draw: random.Random, content: Any) -> tuple[str, str, str]:
    """The kind of change, what was done, and the text with one place changed."""
    places = list(_places(content))
    owner, key = draw.choice(places) if places else (None, None)
    kind = draw.choice(["value", "value", "value", "raw", "remove", "double", "rename", "whole"])
    if owner is None or kind == "whole":
        value = draw.choice(VALUES)
        return "whole", f"the whole becomes {value!r:.40}", json.dumps(value)
    if kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[draw.choice(["x", "", "0", "é"])] = owner.pop(key)
    elif kind == "value":
        owner[key] = value = draw.choice(VALUES)
        return "value", f"{key!r} becomes {value!r:.40}", json.dumps(content)
    else:
        before = owner[key]
        owner[key] = HOLE
        raw = draw.choice(RAW)
        doubled = kind == "double" and isinstance(owner, dict)
        if doubled:
            raw = f"{json.dumps(before)}, {json.dumps(key)}: {json.dumps(before)}"
        return (
            ("double" if doubled else "raw"),
            f"{key!r} becomes {raw[:40]!r}",
            json.dumps(content).replace(f'"{HOLE}"', raw),
        )
    return kind, f"{kind} {key!r}", json.dumps(content)


def _places(content: Any) -> Any:
    """Every value of nested objects and lists, as its owner and its key."""
    stack = [content] if isinstance(content, dict | list) else []
    while stack:
        owner = stack.pop()
        for key, value in list(owner.items() if isinstance(owner, dict) else enumerate(owner)):
            yield owner, key
            # Long lists hold the same thing again and again.
            if isinstance(value, dict) or (isinstance(value, list) and len(value) < 50):
                stack.append(value)
