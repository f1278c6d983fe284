"""A small copy of a model on which tensors are tried: hooks that repeat, change and watch what its modules return."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitecture

ALONG = 1e-3
"""Largest share of a change that may stand across the direction, in float32 through one layer."""
NOTHING = 1e-5
"""Changes below this share of the stream are rounding."""


@dataclass
class Bench:
    """A small copy on which tensors are tried."""

    model: Any
    inputs: dict[str, Tensor]
    layers_path: str
    layers: nn.ModuleList
    width: int
    owners: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that hold matrices, by name."""
    gains: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that hold vectors of the stream's width alone: norms and scales."""
    clean: dict[str, list[Any]] = field(default_factory=dict)
    """What each of them returned, call by call."""
    streams: list[Tensor] = field(default_factory=list)
    """The first layer's input, and every layer's output."""


def bench_of(model: Any, inputs: dict[str, Tensor], width: int) -> Bench:
    """Find a model's decoder layers, and record what its modules return.

    Raises:
        UnsupportedArchitecture: No list of modules hands a stream of the model's width from one to the next.
    """
    path, layers = _decoder_layers(model, inputs, width)
    bench = Bench(model, inputs, path, layers, width)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.dim() > 1 for parameter in own):
            bench.owners[name] = module
        elif any(parameter.shape == (width,) for parameter in own) or _is_bare_norm(module):
            bench.gains[name] = module
    with ExitStack() as hooks:
        for name, module in (bench.owners | bench.gains).items():
            kept = bench.clean.setdefault(name, [])
            hooks.callback(module.register_forward_hook(lambda _, __, out, k=kept: k.append(_detached(out))).remove)
        bench.streams = run(bench)
    return bench


class _DeepEnough(Exception):
    """Ends a forward after the last layer that is looked at."""


@torch.no_grad()
def run(bench: Bench, last: int | None = None) -> list[Tensor]:
    """The stream at the first layer's input and after every layer, up to layer ``last``."""
    streams: list[Tensor] = []

    def keep(layer: int, out: Any) -> None:
        streams.append(hidden_out(out).clone())
        if layer == last:
            raise _DeepEnough

    with ExitStack() as hooks:
        handle = bench.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(hidden_in(args, kwargs).clone()), with_kwargs=True
        )
        hooks.callback(handle.remove)
        for index, layer in enumerate(bench.layers):
            hooks.callback(layer.register_forward_hook(lambda _, __, out, i=index: keep(i, out)).remove)
        with suppress(_DeepEnough):
            bench.model(**bench.inputs, use_cache=False)
    return streams


def _decoder_layers(model: Any, inputs: dict[str, Tensor], width: int) -> tuple[str, nn.ModuleList]:
    calls: dict[int, list[bool]] = {}
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    with ExitStack() as hooks, torch.no_grad():
        for _, part in lists:
            for module in part:

                def see(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                    try:
                        wide = hidden_in(args, kwargs).shape[-1] == hidden_out(out).shape[-1] == width
                    except (KeyError, IndexError, AttributeError, TypeError):
                        wide = False
                    calls.setdefault(id(module), []).append(wide)

                hooks.callback(module.register_forward_hook(see, with_kwargs=True).remove)
        model(**inputs, use_cache=False)
    running = [(name, part) for name, part in lists if all(calls.get(id(module)) == [True] for module in part)]
    if not running:
        raise UnsupportedArchitecture(
            f"{model.config.model_type}: no list of layers hands a stream of width {width} from one layer to the next, "
            "so there is nothing to remove a direction from; add a row in editing/architectures.py"
        )
    return max(running, key=lambda named: (_size(named[1]), -len(named[0])))


def _is_bare_norm(module: nn.Module) -> bool:
    return not list(module.parameters()) and "norm" in type(module).__name__.lower()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_of(bench: Bench, name: str) -> int | None:
    """The decoder layer that a module or parameter belongs to; None outside of layers."""
    prefix = f"{bench.layers_path}."
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments, by position or by name."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    value = kwargs.get("hidden_states", kwargs.get("x"))
    if value is None:
        value = next(value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point())
    return value


def hidden_out(output: Any) -> Tensor:
    """The hidden states in what a module returns, which may be a tuple."""
    if isinstance(output, Tensor):
        return output
    value = output[0]
    if not isinstance(value, Tensor):
        raise TypeError("no hidden states")
    return value


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, tuple):
        return tuple(_detached(part) for part in output)
    return output


def differs(change: Tensor, stream: Tensor) -> bool:
    """Whether a change of the stream is more than rounding."""
    return bool(change.abs().max() > NOTHING * stream.abs().mean().clamp_min(1e-6))


def along(change: Tensor, direction: Tensor) -> bool:
    """Whether a change lies along a direction at every token that it moves."""
    rows = change.reshape(-1, change.shape[-1]).double()
    along = rows @ direction.double()
    across = (rows - along[:, None] * direction.double()).norm(dim=1)
    # Tokens that are hardly changed hold rounding alone.
    seen = rows.norm(dim=1) > 0.05 * rows.norm(dim=1).max()
    return bool((across[seen] <= ALONG * rows.norm(dim=1)[seen]).all())


@contextmanager
def repeating(bench: Bench, alive: str, *more: str, only: set[str] | None = None) -> Iterator[None]:
    """Every module with a matrix returns what it did before, but for ``alive`` and what holds it; so do ``more``."""
    names = set(bench.owners) if only is None else set(only)
    names = {name for name in names if name != alive and not alive.startswith(f"{name}.") and name} | set(more)
    modules = bench.owners | bench.gains
    with ExitStack() as hooks:
        for name in names:
            module, outputs = modules[name], iter(bench.clean[name])
            hooks.callback(module.register_forward_hook(lambda _, __, out, o=outputs: _detached(next(o, out))).remove)
        yield


@contextmanager
def moved_along(parameter: Tensor, axis: int, direction: Tensor) -> Iterator[None]:
    """Add a multiple of a direction to a parameter along one axis, until the context ends."""
    generator = torch.Generator().manual_seed(11)
    kept = parameter.detach().clone()
    scale = float(kept.abs().mean()) * len(direction) ** 0.5
    with torch.no_grad():
        if parameter.dim() == 1:
            parameter.add_(scale * direction)
        elif axis == -1:
            others = torch.randn(parameter.shape[:-1], generator=generator)
            parameter.add_(scale * others[..., None] * direction)
        else:
            others = torch.randn((*parameter.shape[:-2], parameter.shape[-1]), generator=generator)
            parameter.add_(scale * direction[:, None] * others[..., None, :])
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


@contextmanager
def watched(bench: Bench, names: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what these modules read."""
    with ExitStack() as hooks:
        for name in names:

            def keep(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                try:
                    # The first time: some norms serve several places.
                    seen.setdefault(name, hidden_in(args, kwargs).detach().clone())
                except StopIteration:
                    return

            hooks.callback(bench.gains[name].register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield


@contextmanager
def pushed(module: nn.Module, direction: Tensor) -> Iterator[None]:
    """Add a direction to what a module returns."""

    def push(_: nn.Module, __: Any, out: Any) -> Any:
        moved = hidden_out(out) + direction
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = module.register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def added_to_input(layer: nn.Module, noise: Tensor) -> Iterator[None]:
    """Add noise to what a layer reads."""

    def add(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + noise, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + noise}

    handle = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
