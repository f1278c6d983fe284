"""How many operations a piece of work is made of, and how often it waits for a device: counts, which no clock disturbs.

A GPU starts each operation by itself, so that many small ones leave it idle; and where the host asks for a value, it
waits until all before it is done. Both can be counted on any machine.

Example:
    >>> with OperationCounts() as counts:
    ...     float(torch.ones(3).sum())
    3.0
    >>> counts.operations, counts.waits
    (3, 1)
"""

from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")
"""Operations whose result the host needs before it goes on: a value, or how many elements there are."""
DISTINCT = "unique"
"""In the names of operations that find distinct values: how many there are, the host must know."""


class OperationCounts:
    """Counts the operations of this thread, those of backward passes too, while the context lasts."""

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        """Operations by name, such as ``aten.mm``."""
        self.waits = 0
        """Times that the host needs a value from the device."""
        self._operations, self._lists = _Operations(self), _Lists(self)

    @property
    def operations(self) -> int:
        """All of them; views count, because the host takes as long over them."""
        return self.by_name.total()

    def __enter__(self) -> "OperationCounts":
        self._lists.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._operations.__exit__(kind, error, traceback)
        self._lists.__exit__(kind, error, traceback)


class _Operations(TorchDispatchMode):
    def __init__(self, counts: OperationCounts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function.overloadpacket)
        self.counts.by_name[name] += 1
        self.counts.waits += name in WAITING or DISTINCT in name or _waits(name, args, kwargs)
        return function(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation waits because of what it is given."""
    if name in ("aten.index", "aten.index_put", "aten.index_put_"):
        # By a mask, and the number of its places is the size of the result.
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "aten.repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten._to_copy":
        device = kwargs.get("device")
        return device is not None and args[0].device.type not in ("cpu", "meta") and torch.device(device).type == "cpu"
    return False


class _Lists(TorchFunctionMode):
    """On a processor ``tolist`` is no operation, and on a GPU it waits all the same."""

    def __init__(self, counts: OperationCounts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.waits += function in (Tensor.tolist, Tensor.numpy)
        return function(*args, **(kwargs or {}))
