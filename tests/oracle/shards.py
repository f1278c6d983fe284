"""Published weights, read byte by byte from the definition of the file format, and held against the base's.

Nothing here imports excise or the library that writes the files: a test that holds excise against it finds what a shared
shortcut would hide.
"""

import json
import struct
from pathlib import Path

import torch
from torch import Tensor

from .weights import low_rank

MANTISSA = {"F32": 23, "BF16": 7, "F16": 10}
"""Bits after the point."""


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder's safetensors files: 8 bytes of length, a JSON header, data."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        for name, about in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in about["data_offsets"])
                tensors[name] = about["dtype"], tuple(about["shape"]), content[start:end]
    return tensors


def numbers(dtype: str, shape: tuple[int, ...], content: bytes) -> Tensor:
    """The values in float64."""
    if dtype == "BF16":
        # The upper half of a float32.
        padded = b"".join(b"\0\0" + content[place : place + 2] for place in range(0, len(content), 2))
        return numbers("F32", shape, padded)
    letter, size = {"F32": ("f", 4), "F16": ("e", 2)}[dtype]
    return torch.tensor(struct.unpack(f"<{len(content) // size}{letter}", content)).double().reshape(shape)


def worst_of_update(base: Path, edited: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> float:
    """How far an edited folder is from ``W + left right`` rounded once, as a share of half a step of the stored type.

    Float32 sums may err by a millionth. Infinite where a tensor that is not declared differs by a byte.
    """
    before, after = stored(base), stored(edited)
    if {name: part[:2] for name, part in before.items()} != {name: part[:2] for name, part in after.items()}:
        return float("inf")
    if any(before[name][2] != after[name][2] for name in before if name not in factors):
        return float("inf")
    worst = 0.0
    for name, (left, right) in factors.items():
        weight = numbers(*before[name])
        wanted = weight + low_rank(left, right)
        summed = weight.abs() + low_rank(left.abs(), right.abs())
        half = 2.0 ** (torch.floor(torch.log2(wanted.abs().clamp_min(1e-30))) - MANTISSA[before[name][0]] - 1)
        off = (numbers(*after[name]) - wanted).abs() / (half + 1e-6 * summed)
        worst = max(worst, float(off.max()))
    return worst
