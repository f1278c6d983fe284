"""Reading and changing the residual stream of a model.

Point ``l`` of the stream is the input of decoder layer ``l``; point L is the output of the last layer.
Hooks live inside context managers, which remove them after errors too.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import EditError
from ..wiring.row import Architecture


class _DeepEnough(Exception):
    """Ends a forward after the deepest point was read; ``read_streams`` always catches it."""


def decoder_layers(model: nn.Module, row: Architecture) -> nn.ModuleList:
    """The model's decoder layers, by the row's module path."""
    layers = model.get_submodule(row.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sublayers_of(layer: nn.Module, row: Architecture) -> list[tuple[str, nn.Module]]:
    """The modules of one layer whose output is added to the stream, by name; layers of several kinds have others.

    Raises:
        EditError: The layer has none of them.
    """
    modules = []
    for name in row.sublayers:
        with suppress(AttributeError):
            modules.append((name, layer.get_submodule(name)))
    if not modules:
        raise EditError(f"a layer of {row.layers} has none of the modules {', '.join(row.sublayers)}")
    return modules


def read_streams(
    model: nn.Module, row: Architecture, inputs: dict[str, Tensor], points: Sequence[int]
) -> dict[int, Float[Tensor, "batch positions d"]]:
    """The stream at ``points``, by point, in the model's dtype, on the inputs' device, with gradients if enabled.

    The forward stops at the deepest point, so nothing above it is computed.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, padded on either side, on the model's device.
        points: Points of the stream, 0 to the number of layers.

    Raises:
        EditError: A hook did not run, as happens in a compiled model.
    """
    with streams_kept(model, row, points, stops=True) as streams, suppress(_DeepEnough):
        run_decoder(model, inputs)
    return {point: hidden.to(inputs["input_ids"].device) for point, hidden in streams.items()}


@contextmanager
def streams_kept(
    model: nn.Module, row: Architecture, points: Sequence[int], *, stops: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Keep the stream at ``points`` of the forward that runs inside, by point, where it is made.

    Args:
        stops: End that forward at the deepest point, by an exception that ``read_streams`` catches.

    Raises:
        EditError: A hook did not run, as happens in a compiled model.

    Example:
        >>> with streams_kept(model, row, [1, 2]) as streams:
        ...     logits = model(**inputs).logits
        >>> streams[2].shape
        torch.Size([1, 7, 576])
    """
    layers, deepest = decoder_layers(model, row), max(points)
    streams: dict[int, Tensor] = {}

    def keep(point: int, hidden: Tensor) -> None:
        streams[point] = hidden
        if stops and point == deepest:
            raise _DeepEnough

    with ExitStack() as hooks:
        for point in sorted(set(points)):
            if point < len(layers):
                # The defaults p, i and n in these hooks bind the turn's values; a closure would see the last ones of
                # the loop.
                handle = layers[point].register_forward_pre_hook(
                    lambda _, args, kwargs, p=point: keep(p, _hidden(args, kwargs)), with_kwargs=True
                )
            else:
                handle = layers[-1].register_forward_hook(lambda _, __, output, p=point: keep(p, first(output)))
            hooks.callback(handle.remove)
        yield streams
    if missing := set(points) - set(streams):
        raise EditError(
            f"no activation was read at points {sorted(missing)}; hooks do not run in compiled models, "
            "leave out torch.compile"
        )


@torch.no_grad()
def residual_stream(
    model: nn.Module, row: Architecture, inputs: dict[str, Tensor], points: Sequence[int], last: int
) -> Float[Tensor, "points batch last d"]:
    """The stream at ``points`` and the last positions of left-padded inputs, in the model's dtype.

    Args:
        model: A causal language model.
        row: Its architecture.
        inputs: ``input_ids`` and ``attention_mask``, left-padded, on the model's device.
        points: Points of the stream, in the order of the first axis.
        last: Number of positions, counted from the end.

    Raises:
        EditError: A hook did not run, as happens in a compiled model.
    """
    streams = {point: hidden[:, -last:] for point, hidden in read_streams(model, row, inputs, points).items()}
    return torch.stack([streams[point] for point in points])


@contextmanager
def ablated(model: nn.Module, row: Architecture, basis: Float[Tensor, "d k"], strength: float = 1.0) -> Iterator[None]:
    """Remove a subspace from everything written to the stream: embeddings and each sublayer's output.

    In pre-norm models this equals orthogonalizing the weights.

    Args:
        model: A causal language model.
        row: Its architecture.
        basis: Orthonormal columns.
        strength: 1 removes the subspace; values between 0 and 1 remove that share of it.

    Source:
        Arditi et al. 2024, equation 4.
    """

    def project(hidden: Tensor) -> Tensor:
        # In fp32: in bfloat16 rounding would leave a part of the component in place.
        local = basis.to(hidden.device, torch.float32)
        values = hidden.float()
        return (values - strength * (values @ local) @ local.T).to(hidden.dtype)

    layers = decoder_layers(model, row)
    with ExitStack() as hooks:
        # What the embeddings write is the first layer's input.
        hooks.callback(change_input(layers[0], project).remove)
        for layer in layers:
            for _, module in sublayers_of(layer, row):
                hooks.callback(change_output(module, project).remove)
        yield


@contextmanager
def added(model: nn.Module, row: Architecture, vector: Float[Tensor, " d"], point: int) -> Iterator[None]:
    """Add a vector to the stream at one point, at every position of the prompt (activation addition).

    Tokens decoded one by one after the prompt are not changed. A direction read at the end of prompts
    encodes how the reply begins; added to each reply token, it would make the model begin again and again.
    """
    layers = decoder_layers(model, row)

    def add(hidden: Tensor) -> Tensor:
        return hidden if hidden.shape[1] == 1 else hidden + vector.to(hidden.device, hidden.dtype)

    handle = change_input(layers[point], add) if point < len(layers) else change_output(layers[-1], add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipped(model: nn.Module, row: Architecture, layer: int) -> Iterator[None]:
    """Leave out one decoder layer: its output is its input. Layers are counted from 0."""

    def passed_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder_layers(model, row)[layer].register_forward_hook(passed_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def read_early(model: nn.Module, row: Architecture, point: int) -> Iterator[None]:
    """Replace the last layer's output by the stream at ``point``, so that logits are read there (logit lens).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    layers = decoder_layers(model, row)
    stream: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [_hidden(args, kwargs)]

    with ExitStack() as hooks:
        if point < len(layers):
            hooks.callback(layers[point].register_forward_pre_hook(keep, with_kwargs=True).remove)
            # The change is made at the last layer, so that the final norm still stands before the unembedding.
            hooks.callback(change_output(layers[-1], lambda _: stream[0]).remove)
        yield


@contextmanager
def written(model: nn.Module, row: Architecture, see: Callable[[int | None, str, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, sublayer, output)`` with everything that is written to the stream during forwards.

    The embeddings come as ``(None, "embedding", output)``.
    """
    layers = decoder_layers(model, row)
    with ExitStack() as hooks:
        hooks.callback(
            layers[0]
            .register_forward_pre_hook(
                lambda _, args, kwargs: see(None, "embedding", _hidden(args, kwargs)), with_kwargs=True
            )
            .remove
        )
        for index, layer in enumerate(layers):
            for name, module in sublayers_of(layer, row):
                hooks.callback(
                    module.register_forward_hook(lambda _, __, output, i=index, n=name: see(i, n, first(output))).remove
                )
        yield


def run_decoder(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run a causal language model without its unembedding, only to trigger hooks; inputs may be left-padded, or say their
    positions."""
    decoder = model.base_model
    assert isinstance(decoder, nn.Module)
    # Models with learned positions would count the padding on the left; some decoders take no position_ids at all.
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
    # Padding on the left would get position -1, which no table of positions has.
    positions = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)} if takes_positions else {}
    decoder(**positions | inputs, use_cache=False)


def first(output: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # Models differ in whether they pass the hidden states to a layer by position or by name.
    return args[0] if args else kwargs["hidden_states"]


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Replace the hidden states that a module reads by ``change`` of them, until the handle is removed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class RowsAndPositions:
    """Gives activations inside a layer their rows and positions back: OPT flattens them before its MLP."""

    def __init__(self, layer: nn.Module):
        self._sizes: tuple[int, ...] = ()
        self._handle = layer.register_forward_pre_hook(self._remember, with_kwargs=True)

    def of(self, hidden: Tensor) -> Float[Tensor, "batch positions d"]:
        """The same activations, as a view."""
        return hidden.unflatten(0, self._sizes) if hidden.dim() == 2 else hidden

    def remove(self) -> None:
        """Take the hook off that sees the layer's input."""
        self._handle.remove()

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sizes = tuple(_hidden(args, kwargs).shape[:2])


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Replace the hidden states that a module returns by ``change`` of them, until the handle is removed."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        changed = change(first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)
