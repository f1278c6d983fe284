"""Files of tensors: safetensors, opened only where their header and length fit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...editing.errors import one_line
from .opened import Unreadable, regular_file


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The library's handle on a file, whose tensors are read as they are asked for.

    Raises:
        Unreadable: The file is damaged, or holds what cannot be read; also while tensors are read.
        OSError: It does not exist, or the system refuses it.
    """
    from safetensors import SafetensorError, safe_open

    with regular_file(path):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise Unreadable(f"not a whole safetensors file: {one_line(error, 120)}") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        Unreadable: The file is damaged, or holds what cannot be read.
        OSError: It does not exist, or the system refuses it.
    """
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the handle has no `in`


def check_finite_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor holds NaN or an infinity.

    Raises:
        Unreadable: One does; the message names it.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Unreadable(f"tensor {name} holds NaN or infinite values")
