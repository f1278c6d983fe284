"""Bytes of tensors that exist at once, counted while operations run; on pretended tensors nothing is computed or held.

Example:
    >>> with FakeTensorMode():
    ...     weight = torch.empty(4096, 4096)
    ...     with LiveBytes() as live:
    ...         weight @ weight
    >>> live.peak
    67108864
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while the context lasts, each once, until nothing holds it any more."""

    def __init__(self, but: Iterable[Tensor] = ()):
        """Args:
        but: Tensors that are there already, such as weights; views of them count nothing.
        """
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
