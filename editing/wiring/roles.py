"""Finding out which tensors of a model write to the residual stream, by trying each one on a small copy.

One tensor at a time is changed along a random direction, while every other module with a matrix is made to repeat what
it returned before. What then differs in the stream came through no other matrix: if it lies along the direction, the
tensor writes there as it is; if it lies along it where a norm reads, the tensor writes behind that norm; if nothing
differs, it is a reader.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitecture

ALONG = 1e-3
"""Largest share of a change that may stand across the direction, in float32 through one layer."""
NOTHING = 1e-5
"""Changes below this share of the stream are rounding."""

Kind = Literal["embedding", "position", "attention", "mlp"]


@dataclass(frozen=True)
class Role:
    """A parameter that writes to the stream."""

    name: str
    axis: int
    kind: Kind
    gains: tuple[str, ...]
    """Modules between the tensor and the stream that multiply by a gain, nearest first."""
    gain_offset: float
    centred: bool
    """Whether the first of them takes the mean off, as LayerNorm does."""
    sublayer: str | None
    """Module of the layer whose output is added to the stream; None outside of layers."""


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


def writers(bench: Bench, seed: int = 3) -> list[Role]:
    """Every parameter that writes to the stream, with how it does.

    Raises:
        UnsupportedArchitecture: A norm behind a writer cannot be read.
    """
    direction = torch.nn.functional.normalize(
        torch.randn(bench.width, generator=torch.Generator().manual_seed(seed)), dim=0
    )
    roles = []
    for name, parameter in bench.model.named_parameters():
        for axis in (-1, -2)[: parameter.dim()]:
            if parameter.dim() <= 3 and parameter.shape[axis] == bench.width:
                role = _role(bench, name, parameter, axis, direction)
                if role is not None:
                    roles.append(role)
                    break
    return roles


def _role(bench: Bench, name: str, parameter: Tensor, axis: int, direction: Tensor) -> Role | None:
    owner, layer = name.rpartition(".")[0], _layer_of(bench, name)
    points = range(len(bench.streams)) if layer is None else [layer + 1]
    with _repeating(bench, owner), _moved(parameter, axis, direction):
        inputs_of_gains: dict[str, Tensor] = {}
        near = [gain for gain in bench.gains if gain != owner and _layer_of(bench, gain) == layer]
        with _watched(bench, near, inputs_of_gains):
            after = run(bench, layer)
        changes = [after[point] - bench.streams[point] for point in points]
        # Where it arrives first: what the layers after that do to it is shown by the proof.
        moved = [
            change for point, change in zip(points, changes, strict=True) if _differs(change, bench.streams[point])
        ]
        if not moved:
            return None
        if _along(moved[0], direction):
            return _described(bench, name, owner, layer, axis, (), direction)
    return _behind_gains(bench, name, parameter, axis, direction, near)


def _behind_gains(
    bench: Bench, name: str, parameter: Tensor, axis: int, direction: Tensor, near: Sequence[str]
) -> Role | None:
    """The role of a tensor that writes behind norms: each reads the direction, and all of its way leads through it."""
    owner, layer = name.rpartition(".")[0], _layer_of(bench, name)
    moved = lambda: _moved(parameter, axis, direction)  # noqa: E731
    first = _next_gain(bench, owner, layer, moved, direction, near)
    if first is None:
        return None
    gains = [first]
    # Some writes pass a second norm.
    while len(gains) < 3 and not _reaches(
        bench, owner, layer, lambda: _pushed(bench.gains[gains[-1]], direction), direction
    ):
        after = [gain for gain in near if gain not in gains]
        following = _next_gain(
            bench, owner, layer, lambda: _pushed(bench.gains[gains[-1]], direction), direction, after
        )
        if following is None:
            break
        gains.append(following)
    return _described(bench, name, owner, layer, axis, tuple(gains), direction)


Change = Callable[[], AbstractContextManager[None]]


def _next_gain(
    bench: Bench, owner: str, layer: int | None, change: Change, direction: Tensor, near: Sequence[str]
) -> str | None:
    """The norm that reads the direction itself, and without which nothing of a change arrives in the stream."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    with _repeating(bench, owner), _watched(bench, near, before):
        run(bench, layer)
    with _repeating(bench, owner), change(), _watched(bench, near, after):
        run(bench, layer)
    for gain in near:
        if gain not in before or gain not in after:
            continue
        moved = after[gain] - before[gain]
        if not _differs(moved, before[gain]) or not _along(moved, direction):
            continue
        with _repeating(bench, owner, gain), change():
            stream = run(bench, layer)
        points = range(len(bench.streams)) if layer is None else [layer + 1]
        if not any(_differs(stream[point] - bench.streams[point], bench.streams[point]) for point in points):
            return gain
    return None


def _reaches(bench: Bench, owner: str, layer: int | None, change: Change, direction: Tensor) -> bool:
    """Whether a change arrives in the stream along the direction."""
    with _repeating(bench, owner), change():
        stream = run(bench, layer)
    points = range(len(bench.streams)) if layer is None else [layer + 1]
    changes = [stream[point] - bench.streams[point] for point in points]
    moved = [one for point, one in zip(points, changes, strict=True) if _differs(one, bench.streams[point])]
    return bool(moved) and _along(moved[0], direction)


def _described(
    bench: Bench, name: str, owner: str, layer: int | None, axis: int, gains: tuple[str, ...], direction: Tensor
) -> Role:
    source = gains[-1] if gains else owner
    # A norm without a gain divides by one number, which leaves a direction where it is.
    gains = tuple(gain for gain in gains if list(bench.gains[gain].parameters(recurse=False)))
    offset, centred = _norm(bench, gains[0]) if gains else (0.0, False)
    if layer is None:
        words = bench.model.get_input_embeddings()
        is_words = any(parameter is words.weight for parameter in [bench.model.get_parameter(name)])
        return Role(name, axis, "embedding" if is_words else "position", gains, offset, centred, None)
    return Role(name, axis, "mlp", gains, offset, centred, _sublayer(bench, source, layer, direction))


def kinds(bench: Bench, roles: Sequence[Role]) -> dict[str, Kind]:
    """Whether each writer inside a layer moves what earlier tokens hold (attention and its like) or not (an MLP)."""
    kinds: dict[str, Kind] = {}
    found = {role.name.rpartition(".")[0] for role in roles}
    generator = torch.Generator().manual_seed(5)
    for role in roles:
        owner, layer = role.name.rpartition(".")[0], _layer_of(bench, role.name)
        if layer is None:
            kinds[role.name] = role.kind
            continue
        noise = torch.zeros_like(bench.streams[0])
        # The neighbour of the last token, because a window or a decay may hide what stands further away.
        noise[:, -2] = torch.randn(noise[:, -2].shape, generator=generator) * bench.streams[layer].std()
        others = {name for name in found if name != owner}
        with _repeating(bench, owner, only=others), _added_to_input(bench.layers[layer], noise):
            after = run(bench, layer)[layer + 1]
        moved = _differs((after - bench.streams[layer + 1])[:, -1], bench.streams[layer + 1][:, -1])
        kinds[role.name] = "attention" if moved else "mlp"
    return kinds


def _sublayer(bench: Bench, source: str, layer: int, direction: Tensor) -> str:
    """The outermost module around a writer whose output is added to the stream."""
    prefix = f"{bench.layers_path}.{layer}."
    parts = source.removeprefix(prefix).split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        module = bench.layers[layer].get_submodule(name)
        if isinstance(module, nn.ModuleList):
            continue
        with _repeating(bench, prefix + name), _pushed(module, direction):
            try:
                change = run(bench, layer)[layer + 1] - bench.streams[layer + 1]
            except (TypeError, RuntimeError, AttributeError, KeyError):
                # A module whose output is no stream cannot be pushed.
                continue
        if _differs(change, bench.streams[layer + 1]) and _along(change, direction):
            return name
    return ".".join(parts)


@torch.no_grad()
def _norm(bench: Bench, gain: str) -> tuple[float, bool]:
    """What is added to a stored gain before it multiplies (0, or 1 as in Gemma), and whether the mean is taken off."""
    module: Any = bench.gains[gain]
    weight = next(parameter for parameter in module.parameters(recurse=False) if parameter.shape == (bench.width,))
    biases = [bias for name, bias in module.named_parameters(recurse=False) if "bias" in name]
    kept = [parameter.clone() for parameter in (weight, *biases)]
    hidden = torch.randn(1, 3, bench.width, generator=torch.Generator().manual_seed(1))
    try:
        for bias in biases:
            bias.zero_()
        weight.zero_()
        nothing = module(hidden)
        weight.fill_(1.0)
        one, shifted = module(hidden), module(hidden + 1.0)
    except (TypeError, RuntimeError) as error:  # a norm that wants more than the hidden states
        raise UnsupportedArchitecture(
            f"{gain} stands between weights and the residual stream and cannot be read by itself; add a row in "
            "editing/architectures.py"
        ) from error
    finally:
        for parameter, value in zip((weight, *biases), kept, strict=True):
            parameter.copy_(value)
    offset = float((nothing.abs().sum() / (one - nothing).abs().sum().clamp_min(1e-12)).round())
    return offset, bool(torch.dist(one, shifted) < ALONG * one.norm())


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


def _layer_of(bench: Bench, name: str) -> int | None:
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


def _differs(change: Tensor, stream: Tensor) -> bool:
    return bool(change.abs().max() > NOTHING * stream.abs().mean().clamp_min(1e-6))


def _along(change: Tensor, direction: Tensor) -> bool:
    rows = change.reshape(-1, change.shape[-1]).double()
    along = rows @ direction.double()
    across = (rows - along[:, None] * direction.double()).norm(dim=1)
    # Tokens that are hardly changed hold rounding alone.
    seen = rows.norm(dim=1) > 0.05 * rows.norm(dim=1).max()
    return bool((across[seen] <= ALONG * rows.norm(dim=1)[seen]).all())


@contextmanager
def _repeating(bench: Bench, alive: str, *more: str, only: set[str] | None = None) -> Iterator[None]:
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
def _moved(parameter: Tensor, axis: int, direction: Tensor) -> Iterator[None]:
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
def _watched(bench: Bench, names: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
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
def _pushed(module: nn.Module, direction: Tensor) -> Iterator[None]:
    def push(_: nn.Module, __: Any, out: Any) -> Any:
        moved = hidden_out(out) + direction
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = module.register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _added_to_input(layer: nn.Module, noise: Tensor) -> Iterator[None]:
    def add(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + noise, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + noise}

    handle = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
