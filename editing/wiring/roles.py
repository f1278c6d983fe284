"""Finding out which tensors of a model write to the residual stream, by trying each one on a small copy.

One tensor at a time is changed along a random direction, while every other module with a matrix is made to repeat what
it returned before. What then differs in the stream came through no other matrix: if it lies along the direction, the
tensor writes there as it is; if it lies along it where a norm reads, the tensor writes behind that norm; if nothing
differs, it is a reader.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitecture
from .bench import (
    ALONG,
    Bench,
    added_to_input,
    along,
    differs,
    layer_of,
    moved_along,
    pushed,
    repeating,
    run,
    watched,
)
from .row import Kind


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


Change = Callable[[], AbstractContextManager[None]]


def _role(bench: Bench, name: str, parameter: Tensor, axis: int, direction: Tensor) -> Role | None:
    owner, layer = name.rpartition(".")[0], layer_of(bench, name)
    arrived = _arrived(bench, layer, partial(moved_along, parameter, axis, direction), owner)
    if arrived is None:
        return None
    if along(arrived, direction):
        return _described(bench, name, owner, layer, axis, (), direction)
    near = [gain for gain in bench.gains if gain != owner and layer_of(bench, gain) == layer]
    return _behind_gains(bench, name, parameter, axis, direction, near)


def _arrived(bench: Bench, layer: int | None, change: Change, owner: str, *silent: str) -> Tensor | None:
    """What a change moves in the stream where it arrives first; None if nothing arrives.

    What the layers behind that do to it is shown by the proof.

    Args:
        layer: The layer that is changed; None outside of layers.
        owner: The module that is changed; every other one with a matrix returns what it did before.
        silent: Further modules that do.
    """
    with repeating(bench, owner, *silent), change():
        after = run(bench, layer)
    points = range(len(bench.streams)) if layer is None else [layer + 1]
    moved = [(after[point] - bench.streams[point], bench.streams[point]) for point in points]
    return next((one for one, stream in moved if differs(one, stream)), None)


def _behind_gains(
    bench: Bench, name: str, parameter: Tensor, axis: int, direction: Tensor, near: Sequence[str]
) -> Role | None:
    """The role of a tensor that writes behind norms: each reads the direction, and all of its way leads through it."""
    owner, layer = name.rpartition(".")[0], layer_of(bench, name)
    first = _next_gain(bench, owner, layer, partial(moved_along, parameter, axis, direction), direction, near)
    if first is None:
        return None
    gains = [first]
    # Some writes pass a second norm.
    while len(gains) < 3:
        behind = partial(pushed, bench.gains[gains[-1]], direction)
        after = [gain for gain in near if gain not in gains]
        arrived = _arrived(bench, layer, behind, owner)
        if arrived is not None and along(arrived, direction):
            break
        if (following := _next_gain(bench, owner, layer, behind, direction, after)) is None:
            break
        gains.append(following)
    return _described(bench, name, owner, layer, axis, tuple(gains), direction)


def _next_gain(
    bench: Bench, owner: str, layer: int | None, change: Change, direction: Tensor, near: Sequence[str]
) -> str | None:
    """The norm that reads the direction itself, and without which nothing of a change arrives in the stream."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    with repeating(bench, owner), watched(bench, near, before):
        run(bench, layer)
    with repeating(bench, owner), change(), watched(bench, near, after):
        run(bench, layer)
    for gain in near:
        if gain not in before or gain not in after:
            continue
        moved = after[gain] - before[gain]
        if not differs(moved, before[gain]) or not along(moved, direction):
            continue
        if _arrived(bench, layer, change, owner, gain) is None:
            return gain
    return None


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
        owner, layer = role.name.rpartition(".")[0], layer_of(bench, role.name)
        if layer is None:
            kinds[role.name] = role.kind
            continue
        noise = torch.zeros_like(bench.streams[0])
        # The neighbour of the last token, because a window or a decay may hide what stands further away.
        noise[:, -2] = torch.randn(noise[:, -2].shape, generator=generator) * bench.streams[layer].std()
        others = {name for name in found if name != owner}
        with repeating(bench, owner, only=others), added_to_input(bench.layers[layer], noise):
            after = run(bench, layer)[layer + 1]
        moved = differs((after - bench.streams[layer + 1])[:, -1], bench.streams[layer + 1][:, -1])
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
        with repeating(bench, prefix + name), pushed(module, direction):
            try:
                change = run(bench, layer)[layer + 1] - bench.streams[layer + 1]
            except (TypeError, RuntimeError, AttributeError, KeyError):
                # A module whose output is no stream cannot be pushed.
                continue
        if differs(change, bench.streams[layer + 1]) and along(change, direction):
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
