"""GPUs that are not there: tensors on the processor that say they lie on another device, and refuse what a GPU refuses.

Values are real, so that what is computed on a pretended device can be compared with the processor's. The device is
called "meta", because PyTorch needs no library for it.

Example:
    >>> with pretended_gpus():
    ...     model = on_gpu(make_pico("llama"))
    ...     model(input_ids=torch.tensor([[1, 2]]))  # RuntimeError: the ids are on the processor
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("meta", 0)
SECOND_GPU = torch.device("meta", 1)
CPU = torch.device("cpu")
aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default}
"""What moves values between devices."""
INDEXED = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip
"""Where PyTorch takes indices on the processor for a tensor on a GPU."""


class MixedDevices(RuntimeError):
    """What a GPU would have refused."""


class Pretended(Tensor):
    """Values on the processor that say they are on a GPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "Pretended":
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["inner"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], device: torch.device, *_: Any) -> "Pretended":
        return Pretended(parts["inner"], device)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {}, wide=True)


class _FromLists(TorchFunctionMode):
    """Numbers and lists of Python become tensors on the processor first: the real "meta" device would lose them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return function(*args, **{**kwargs, "device": None}).to(device)
        if function is Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].cpu().tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretended):
            place = args[1] if isinstance(args[1], tuple) else (args[1],)
            values = [torch.tensor(v, dtype=args[0].dtype) if isinstance(v, float | int) else v for v in args[2:]]
            args = (args[0], tuple(torch.tensor(p) if isinstance(p, list) else p for p in place), *values)
        return function(*args, **kwargs)


class _Machine(TorchDispatchMode):
    def __init__(self, wide: bool):
        super().__init__()
        self.wide = wide

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {}, wide=self.wide)


def _computed(operator: Any, args: Any, kwargs: dict[str, Any], *, wide: bool) -> Any:
    tensors = [value for value in tree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    assert not any(t.is_meta for t in tensors if not isinstance(t, Pretended)), (
        f"{operator} got a tensor without values"
    )
    where = {t.device for t in tensors if isinstance(t, Pretended)}
    if len(where) > 1 and operator not in ACROSS:
        raise MixedDevices(f"{operator} got tensors on {', '.join(sorted(map(str, where)))}")
    device = next((t.device for t in tensors if isinstance(t, Pretended)), CPU)
    if "device" in kwargs and kwargs["device"] is not None:
        device = torch.device(kwargs["device"])
        if device.type == "meta":
            device = torch.device("meta", device.index or 0)
    if where and operator not in ACROSS:
        _check_alike(operator, args, tensors)
    if device == CPU and not where:
        return operator(*args, **kwargs)
    inside = {**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs
    unwrapped, named = tree.tree_map_only(Pretended, lambda t: t.inner, (args, inside))
    if operator is aten.histc.default:
        # Counts whole numbers on GPUs alone.
        unwrapped = (unwrapped[0].float(), *unwrapped[1:])
    result = operator(*unwrapped, **named)
    if device == CPU:
        return result
    if not wide and any(t.dtype == torch.float64 for t in tree.tree_leaves(result) if isinstance(t, Tensor)):
        raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({operator})")
    if operator is aten.copy_.default and not isinstance(args[0], Pretended):
        return args[0]
    wrapped = tree.tree_map_only(Tensor, lambda t: t if isinstance(t, Pretended) else Pretended(t, device), result)
    return return_and_correct_aliasing(operator, args, kwargs, wrapped)


def _check_alike(operator: Any, args: Any, tensors: list[Tensor]) -> None:
    here = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
    if operator in INDEXED:
        of_indices = {id(t) for t in args[1] if t is not None}
        here = [t for t in here if id(t) not in of_indices]
        if not isinstance(args[0], Pretended):
            raise MixedDevices(f"{operator} indexes a tensor on the processor by one on a GPU")
    if here:
        raise MixedDevices(f"{operator} got a tensor {list(here[0].shape)} on the processor and another on a GPU")


@contextmanager
def pretended_gpus(*, wide: bool = True) -> Iterator[None]:
    """Let code make tensors on the pretended GPUs; with ``wide=False`` they know no float64, as on Apple's."""
    with _FromLists(), _Machine(wide):
        yield


def on_gpu(value: Any, device: torch.device = GPU) -> Any:
    """A module moved in place, or a copy of tensors in any structure."""
    if isinstance(value, nn.Module):
        _move(value, device, {})
        # More than one entry keeps the trainer from moving it.
        value.hf_device_map = {"lower": 0, "upper": 1}
        return value
    return tree.tree_map_only(Tensor, lambda t: Pretended(t.detach().clone(), device), value)


def on_two_gpus(value: Any) -> Any:
    """The same, with the upper half of a model's layers on a second GPU, as accelerate spreads models."""
    layers = next((m for m in value.modules() if isinstance(m, nn.ModuleList)), None) if _is_model(value) else None
    if layers is None:
        return on_gpu(value)
    blocks = {layer: SECOND_GPU if 2 * place >= len(layers) else GPU for place, layer in enumerate(layers)}
    decoder = value.base_model
    # What stands behind the layers is on the second GPU too, but not a head that is the embedding.
    last = [m for name, m in decoder.named_children() if name in ("norm", "ln_f", "final_layer_norm")]
    head = value.get_output_embeddings()
    tied = head.weight is value.get_input_embeddings().weight
    blocks |= dict.fromkeys(last, SECOND_GPU) | {head: GPU if tied else SECOND_GPU}
    moved: dict[int, Any] = {}
    for block, device in blocks.items():
        _move(block, device, moved)
        block.register_forward_pre_hook(_bring_to(device), with_kwargs=True)
    _move(value, GPU, moved)
    value.hf_device_map = {"lower": 0, "upper": 1}
    # The whole model returns what it made where its inputs were.
    value.register_forward_hook(lambda _, __, output: _brought(output, GPU))
    return value


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) and hasattr(value, "get_output_embeddings")


def _bring_to(device: torch.device) -> Any:
    return lambda _, args, kwargs: (_brought(args, device), _brought(kwargs, device))


def _brought(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = _brought(value[key], device)
    return type(value)(_brought(part, device) for part in value) if isinstance(value, list | tuple) else value


def _move(module: nn.Module, device: torch.device, moved: dict[int, Any]) -> None:
    """Move what is not moved yet; a parameter of two modules stays one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, Pretended):
                new = nn.Parameter(Pretended(parameter.detach().clone(), device), parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Pretended):
                part._buffers[name] = Pretended(buffer.clone(), device)
