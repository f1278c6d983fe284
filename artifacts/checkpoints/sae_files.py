"""Tensors of an autoencoder's file, read as far as they are needed: safetensors, an archive of arrays, or a pickle of
nothing but tensors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...editing.errors import RequestError, one_line
from ..files.opened import Unreadable, regular_file
from ..files.tensors import open_safetensors

Read = Callable[[str, Sequence[int] | None, int], Tensor]
"""Reads a tensor by key: all of it, or only the given indices along an axis."""


def open_tensors(path: Path) -> tuple[set[str], Callable[[str], Sequence[int]], Read]:
    """Keys of a file, the shape of a tensor, and a function that reads one.

    Raises:
        Unreadable: The file is damaged or holds something else.
        RequestError: It is a pickle of more than tensors, and was not loaded.
    """
    if path.suffix != ".safetensors":
        loaded = _arrays(path) if path.suffix == ".npz" else _unpickled(path)

        def pick(key: str, indices: Sequence[int] | None, axis: int) -> Tensor:
            whole = loaded[key]
            return whole.float() if indices is None else whole.index_select(axis, torch.tensor(list(indices))).float()

        return set(loaded), lambda key: loaded[key].shape, pick
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no `in` either

    def cut(key: str, indices: Sequence[int] | None, axis: int) -> Tensor:
        with open_safetensors(path) as file:
            if indices is None:
                whole: Tensor = file.get_tensor(key)
                return whole.float()
            part = file.get_slice(key)
            if len(shapes[key]) == 1:
                return torch.cat([part[i : i + 1] for i in indices]).float()
            return torch.cat([part[i : i + 1] if axis == 0 else part[:, i : i + 1] for i in indices], axis).float()

    return set(shapes), shapes.__getitem__, cut


def _arrays(path: Path) -> Mapping[str, Tensor]:
    with regular_file(path):
        pass
    try:
        # A pickle inside an archive of arrays could run code.
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.as_tensor(archive[key]) for key in archive.files}
    except Exception as error:  # numpy and zipfile raise dozens of kinds
        raise Unreadable(f"not an archive of arrays: {one_line(error, 120)}") from error


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    with regular_file(path):
        pass
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise RequestError(
            f"{path.name} is not a plain file of tensors ({one_line(error, 120)}), and could run code; it was not "
            "loaded"
        ) from error
    if not isinstance(content, Mapping):
        raise Unreadable(f"it holds a {type(content).__name__}, not tensors by name")
    # Some libraries store settings beside the tensors.
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
