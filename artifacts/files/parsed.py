"""JSON and YAML, read strictly: bounded depth, no key twice, finite decimal numbers, and nothing to be guessed.

Python's own readers keep the last of two equal keys, read NaN, recurse as deep as a file asks for, and take ``1:30`` in
YAML for the number 90.
"""

import json
import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ...editing.errors import one_line
from .opened import MAX_JSON, MAX_TEXT, MAX_YAML, Unreadable, decoded_lines, read_text

MAX_DEPTH = 100
MAX_DIGITS = 40
"""Digits of the longest integer; tokenizers state a length of 31."""
DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        Unreadable: It is not JSON, nested too deeply, holds a key twice, a number that is not finite or half a
            character.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_decimal, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError as error:
        raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    _check(value, halves=r"\ud" in text or r"\uD" in text)
    return value


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value in a JSON file.

    Raises:
        Unreadable: The file cannot be read as JSON.
        OSError: It does not exist, or the system refuses it.
    """
    return parse_json(read_text(path, most))


def read_object(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Unreadable: The file cannot be read as a JSON object.
        OSError: It does not exist, or the system refuses it.
    """
    return parsed_object(read_text(path, most))


def parsed_object(text: str) -> dict[str, Any]:
    """The JSON object of a text.

    Raises:
        Unreadable: It is something else.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise Unreadable(f"it holds {_kind(value)}, not a JSON object")
    return value


def read_lines(path: Path, most: int = MAX_TEXT) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
        Unreadable: It is no regular file, too large, or not UTF-8.
        OSError: It does not exist, or the system refuses it.
    """
    for number, line in decoded_lines(path, most, most):
        if line.strip():
            yield number, line.removesuffix("\n")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, as YAML 1.2 reads it: ``yes`` and ``1:30`` are texts, ``010`` is ten.

    Raises:
        Unreadable: It is not YAML, nested too deeply, holds a key twice, an alias, or a number that is not finite.
    """
    return _of_yaml(text)[0]


def read_settings_lines(path: Path) -> list[tuple[str, Any, int]]:
    """Key, value and line of each entry of a YAML file that holds one mapping; an empty file has none.

    Raises:
        Unreadable: The file cannot be read as YAML, or holds something else.
        OSError: It does not exist, or the system refuses it.
    """
    content, node = _of_yaml(read_text(path, MAX_YAML))
    if node is None:
        return []
    if not isinstance(content, dict):
        raise Unreadable("line 1 holds no settings")
    return [(key.value, content[key.value], key.start_mark.line + 1) for key, _ in node.value]


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        Unreadable: The file cannot be read as YAML.
        OSError: It does not exist, or the system refuses it.
    """
    return parse_yaml(read_text(path, MAX_YAML))


def _of_yaml(text: str) -> tuple[Any, Any]:
    try:
        loader = _Loader(text)
        try:
            # Composed first, because only nodes know the lines they come from.
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(f"line {mark.line + 1 if mark else 1} is not YAML: {error.problem}") from error
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(f"not YAML: {one_line(error)}") from error
    _check(value, halves=False)
    return value, node


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without aliases, which can make a small file a huge value."""

    # An own table: the class above would share its resolvers.
    yaml_implicit_resolvers = {}  # noqa: RUF012  the library's attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value again", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not a text; quote it", key.start_mark)
            if key.value in keys:
                problem = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def _core(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), [*first] or [""])


_core("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_core("null", "~|null|Null|NULL", "~nN")
_core("null", "", "")
_core("int", "[-+]?[0-9]+", "-+0123456789")
_core("float", DECIMAL.pattern, "-+.0123456789")
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: _integer(str(node.value)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _decimal(str(node.value)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise Unreadable(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"a number has {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _decimal(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Unreadable(f"the number {digits[:MAX_DIGITS]} is not finite")
    return value


def _constant(name: str) -> float:
    raise Unreadable(f"{name} is not a finite number")


def _check(value: Any, *, halves: bool) -> None:
    """Depth and kinds of a value, without recursion; ``halves`` looks for halves of characters in texts too."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                level_texts = [*item]
            elif isinstance(item, list):
                below += item
                level_texts = []
            elif item is None or isinstance(item, bool | int | float | str):
                level_texts = [item] if isinstance(item, str) else []
            else:
                raise Unreadable(f"it holds {_kind(item)}; quote it to make it a text")
            if halves and any(not _is_whole(text) for text in level_texts):
                raise Unreadable("a text holds half of a character pair")
        level, depth = below, depth + 1


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
