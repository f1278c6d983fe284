"""The metadata of a GGUF file, walked once with every length held against the file's, before a library believes it."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..files.opened import Unreadable, regular_file

VERSIONS = (2, 3)
ALIGNMENT = 32
"""Tensors begin at multiples of so many bytes, unless the metadata say otherwise."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Formats of the numbers, by the type's number in the file."""
TEXT, LIST = 8, 9
LONGEST = 1 << 24
"""Bytes of the longest text: chat templates and vocabulary entries are far shorter."""
WIDTHS = ("embedding_length", "feed_forward_length", "vocab_size", "head_count", "head_count_kv", "expert_count")
"""Sizes in the metadata that cannot be larger than the largest dimension of any tensor."""


@dataclass(frozen=True)
class Header:
    """What is needed of the metadata."""

    integers: dict[str, int]
    """Whole numbers by key."""
    shapes: dict[str, tuple[int, ...]]
    """Of each tensor."""


@dataclass(frozen=True)
class _Listed:
    """A tensor as the list names it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """From where the data begin."""


def read_gguf_header(path: Path) -> Header:
    """Walk through metadata and tensor list.

    Raises:
        Unreadable: The file is no GGUF file, cut short, longer than its tensors, or states sizes that these do not have.
        OSError: It does not exist, or the system refuses it.
    """
    with regular_file(path) as file:
        if file.read(4) != b"GGUF":
            raise Unreadable("it is not a GGUF file")
        walk = _Walk(file, path.stat().st_size)
        version = walk.number("I")
        if version not in VERSIONS:
            raise Unreadable(f"it is of GGUF version {version}, versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        tensors, entries = walk.number("Q"), walk.number("Q")
        integers = dict(walk.entries(entries))
        listed = list(walk.tensors(tensors))
        start, size = file.tell(), path.stat().st_size
    header = Header(integers, {tensor.name: tensor.shape for tensor in listed})
    _check_sizes(header)
    _check_places(listed, start, size, integers.get("general.alignment", ALIGNMENT))
    return header


class _Walk:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self._take(struct.calcsize(form)))[0])

    def entries(self, count: int) -> Iterator[tuple[str, int]]:
        for _ in range(count):
            key, kind = self._text(), self.number("I")
            if (value := self._value(kind)) is not None:
                yield key, value

    def tensors(self, count: int) -> Iterator[_Listed]:
        for _ in range(count):
            name, dimensions = self._text(), self.number("I")
            if dimensions > 4:
                raise Unreadable(f"tensor {name[:60]!r} has {dimensions} dimensions, at most 4 are allowed")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            yield _Listed(name, shape, self.number("I"), self.number("Q"))

    def _value(self, kind: int, depth: int = 0) -> int | None:
        """A whole number; None for everything else, which is walked over."""
        if kind in NUMBERS:
            form = NUMBERS[kind]
            if form in "fd":
                self._take(struct.calcsize(form))
                return None
            return self.number(form)
        if kind == TEXT:
            self._text()
            return None
        if kind != LIST or depth > 2:
            raise Unreadable(f"its metadata hold a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            self._take(count * struct.calcsize(NUMBERS[inner]), kept=False)
            return None
        # A count that is too large ends at the end of the file, because every value takes bytes.
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _text(self) -> str:
        length = self.number("Q")
        if length > LONGEST:
            raise Unreadable(f"a text in its metadata has {length} bytes")
        return self._take(length).decode("utf-8", errors="replace")

    def _take(self, count: int, *, kept: bool = True) -> bytes:
        if count > self.size - self.file.tell():
            raise Unreadable(f"it is cut short, or a length in its metadata is wrong: {self.size} bytes")
        if kept:
            return self.file.read(count)
        self.file.seek(count, 1)
        return b""


def _check_places(listed: Sequence[_Listed], start: int, size: int, alignment: int) -> None:
    """One tensor follows the other to the end of the file: where bytes are missing or added, all after them are others."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if alignment < 1:
        raise Unreadable(f"it states general.alignment = {alignment}")
    end = start + -start % alignment
    for tensor in sorted(listed, key=lambda one: one.offset):
        if start + -start % alignment + tensor.offset != end + -end % alignment:
            raise Unreadable(f"tensor {tensor.name[:60]!r} does not begin where the one before it ends")
        try:
            values, room = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except ValueError:
            # The library that converts it says which types it knows.
            return
        end += -end % alignment + math.prod(tensor.shape) // values * room
    if not end <= size <= end + -end % alignment:
        raise Unreadable(f"its tensors end at byte {end}, but it has {size} bytes")


def _check_sizes(header: Header) -> None:
    """A model is built by these sizes before any tensor is looked at, so a wrong one costs hours and all memory."""
    largest = max((length for shape in header.shapes.values() for length in shape), default=0)
    for key, value in header.integers.items():
        name = key.rsplit(".", 1)[-1]
        most = len(header.shapes) if name == "block_count" else largest if name in WIDTHS else None
        if most is not None and not 0 <= value <= most:
            raise Unreadable(f"it states {key} = {value}, which its {len(header.shapes)} tensors do not have")
