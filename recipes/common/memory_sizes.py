"""How much memory a model's weights, forwards and training steps take, found on a pretended copy of it.

The copy has the model's real shapes and no values, so a forward over it computes nothing and takes no memory; what it
would hold is counted. Few layers are run, and the others are added, because each takes as much as those like it.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...artifacts.files.parsed import parsed_object
from ...editing.architectures import architecture_of
from ...editing.errors import ExciseError, one_line
from ...editing.hooks.residual_stream import decoder_layers
from ...editing.modules import causal_model, final_hidden, is_linear, language_config
from ...editing.numerics.live_bytes import LiveBytes
from ...editing.training.adapters import AdapterShape, attach, detach
from ...editing.training.parallel_adapters import low_rank_attackers
from ...editing.training.soft_targets import positions_at_once
from ...editing.wiring.small_copy import full_config, model_class
from .whole_weights import computed_in

STATE_BYTES = 16
"""Bytes of a trained number: itself in fp32, its gradient, and AdamW's two moments."""
NF4_BITS = 4.127
"""Bits of a weight in NF4 with double quantization: one scale of 8 bits for 64 weights, one of 32 for 256 of these."""
Run = Callable[[Any, LiveBytes], None]


@dataclass(frozen=True)
class Rows:
    """What one forward reads."""

    count: int
    length: int
    """Tokens of each, padding included."""

    @property
    def tokens(self) -> int:
        return self.count * self.length


def largest_of(lengths: Sequence[int], size: int) -> Rows:
    """The batch that pads to most tokens, of rows that are read ``size`` at a time in this order.

    Example:
        >>> largest_of([3, 9, 4, 4], 2)
        Rows(count=2, length=9)
    """
    parts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return max((Rows(len(part), max(part)) for part in parts), key=lambda rows: rows.tokens)


def largest_packed(batches: Sequence[Sequence[int]]) -> Rows:
    """The same of batches that are read without padding: rows that have its tokens together, none shorter than the longest
    of any batch.

    Example:
        >>> largest_packed([[3, 9, 4], [4, 9, 5]])
        Rows(count=2, length=9)
    """
    most = max(map(sum, batches))
    count = max(1, most // max(map(max, batches)))
    return Rows(count, -(-most // count))


@dataclass(frozen=True)
class Gradients:
    """What gets gradients in a training step."""

    shape: AdapterShape | None = None
    """Adapters; None differentiates with respect to the embeddings, as scores of units do."""
    attackers: int = 0
    """How many independent adapters of this shape share a forward; 0 is the one adapter of a training."""
    whole: bool = False
    """Train the modules' own weights, in fp32."""
    deepest: int | None = None
    """The last layer that is computed; None computes all, and the unembedding."""
    products: torch.dtype | None = None
    """What products are computed in where that is not the type of what is trained."""


class Unplanned(ExciseError):
    """The model's code looks at values, and a pretended copy has none."""


class ModelSizes:
    """The sizes of one model in one dtype.

    Raises:
        Unplanned: The model's code cannot be run without values.

    Example:
        >>> sizes = ModelSizes(config, torch.bfloat16)
        >>> sizes.weights(), sizes.forward(Rows(8, 512))
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype):
        """Args:
        config: The content of ``config.json``.
        dtype: What the weights are loaded in.
        """
        self.dtype, self.row = dtype, architecture_of(config)
        self._found: dict[str, int] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with _explained(config), self._mode, torch.random.fork_rng(devices=[]):
            self.model: Any = model_class(config)._from_config(full_config(config), dtype=dtype)
            # The pretended product of experts is there for bfloat16 alone; in float32 all is twice as large.
            self._fused = any(p.dim() == 3 for p in self.model.parameters())
            if self._fused and dtype == torch.float32:
                self.model = model_class(config)._from_config(full_config(config), dtype=torch.bfloat16)
        self.model.eval().requires_grad_(False)
        self.layers: nn.ModuleList = decoder_layers(self.model, self.row)
        self.depth, self.period = len(self.layers), _period(list(self.layers), language_config(self.model))
        self.vocabulary = int(language_config(self.model).vocab_size)
        self.width = int(self.model.get_input_embeddings().weight.shape[1])

    def weights(self, bits: int = 16) -> int:
        """Bytes of all weights; with 4 bits, of linear weights but the unembedding in NF4."""
        total = sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize
        if bits == 4:
            packed = sum(weight.numel() for weight in self.linear_weights())
            total -= int(packed * (self.dtype.itemsize - NF4_BITS / 8))
        return total

    def linear_weights(self) -> list[nn.Parameter]:
        """Weights of linear modules inside the layers."""
        return [module.get_parameter("weight") for module in self.layers.modules() if is_linear(module)]

    def widest(self) -> int:
        """Numbers that the widest module of a layer reads for one token."""
        return max(max(weight.shape) for weight in self.linear_weights())

    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return max(parameter.numel() for parameter in self.model.parameters())

    def adapter(self, shape: AdapterShape) -> int:
        """Numbers of an adapter."""
        modules = [self.model.get_parameter(f"{name}.weight") for name in shape.modules]
        linear = sum(shape.rank * sum(weight.shape) for weight in modules)
        # Fused experts [experts, ..., ...] have an adapter each.
        fused = [(count, self.model.get_parameter(name).shape[-2:]) for name, count in shape.experts.items()]
        return linear + sum(count * shape.rank * sum(sides) for count, sides in fused)

    def head(self, device: torch.device) -> int:
        """Bytes of the logits that a loss holds at a time, with their gradient."""
        return positions_at_once(self.vocabulary, device) * self.vocabulary * (12 + self.dtype.itemsize)

    def forward(self, rows: Rows, *, cached: bool = False) -> int:
        """Bytes that a forward without gradients takes at most; its keys and values included where they are kept."""

        def run(model: Any, live: LiveBytes) -> None:
            with torch.no_grad():
                ids = torch.zeros(rows.count, rows.length, dtype=torch.long)
                causal_model(model).base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=cached)

        return self._once(
            ("forward", rows, cached), lambda: self._extended(run, lambda count: nullcontext(), self.depth, 0)
        )

    def step(self, rows: Rows, gradients: Gradients, *, checkpointing: bool = False) -> int:
        """Bytes that forward and backward of a training step take at most, beside weights, parameters, states and logits;
        gradients of whole weights are among them."""
        adapted, above = self._adapted_layers(gradients)

        def run(model: Any, live: LiveBytes) -> None:
            model.train()
            with computed_in(gradients.products, torch.device("cpu")):
                if gradients.shape is None:
                    _gradients_from_embeddings(model)
                loss = _loss(model, rows)
            loss.backward()

        return self._once(
            ("step", rows, gradients, checkpointing),
            lambda: self._extended(
                run, lambda layers: self._trained(gradients, layers, checkpointing=checkpointing), adapted, above
            ),
            whole=gradients.whole,
        )

    def _once(self, asked: object, find: Callable[[], int], *, whole: bool = False) -> int:
        """A size that is asked for again and again, found once."""
        times = 2 if self._fused and (whole or self.dtype == torch.float32) else 1
        key = repr(asked)
        if key not in self._found:
            with _explained(self.model.config.to_dict()):
                self._found[key] = times * find()
        return self._found[key]

    def _adapted_layers(self, gradients: Gradients) -> tuple[int, int]:
        """How many layers are adapted or between those, and how many above them gradients pass through."""
        end = self.depth if gradients.deepest is None else gradients.deepest + 1
        if gradients.shape is None:
            return end, 0
        start = len(self.row.layers) + 1
        chosen = [int(name[start:].split(".")[0]) for name in gradients.shape.weights]
        return max(chosen) - min(chosen) + 1, end - max(chosen) - 1

    @contextmanager
    def _trained(self, gradients: Gradients, layers: int, *, checkpointing: bool) -> Iterator[Any]:
        """The model with fresh parameters on its first layers, and gradients that stand already."""
        if gradients.shape is None:
            with _checkpointing(self.model, checkpointing):
                yield self.model
            return
        start = len(self.row.layers) + 1
        first = min(int(name[start:].split(".")[0]) for name in gradients.shape.weights)
        # The first adapted layers stand for all.
        wanted = {f"{self.row.layers}.{first + place}." for place in range(layers)}
        modules = tuple(
            self._moved(name, -first)
            for name in gradients.shape.modules
            if any(name.startswith(front) for front in wanted)
        )
        experts = {
            self._moved(name, -first): count
            for name, count in gradients.shape.experts.items()
            if any(name.startswith(front) for front in wanted)
        }
        shape = AdapterShape(gradients.shape.rank, gradients.shape.alpha, modules, experts)
        with torch.random.fork_rng(devices=[]), self._with_parameters(gradients, shape) as model:
            for parameter in model.parameters():
                # Of whole weights they are made as activations go, so they count where they are made.
                stands = parameter.requires_grad and not gradients.whole
                parameter.grad = torch.zeros_like(parameter) if stands else None
            with _checkpointing(self.model, checkpointing):
                yield model

    @contextmanager
    def _with_parameters(self, gradients: Gradients, shape: AdapterShape) -> Iterator[Any]:
        if gradients.whole:
            with self._whole(shape):
                yield self.model
        elif gradients.attackers:
            seeds = list(range(gradients.attackers))
            with low_rank_attackers(self.model, shape.modules, shape.rank, shape.alpha / shape.rank, seeds) as adapters:
                adapters.assigned = seeds
                yield self.model
        else:
            with _left_where_made():
                adapted = attach(self.model, shape, 0)
            try:
                yield adapted
            finally:
                detach(adapted)

    @contextmanager
    def _whole(self, shape: AdapterShape) -> Iterator[None]:
        """The modules' own weights get gradients, and all parameters are in fp32, as in training."""
        weights = [self.model.get_submodule(name).weight for name in shape.modules]
        weights += [self.model.get_parameter(name) for name in shape.experts]
        types = {parameter: parameter.dtype for parameter in self.model.parameters()}
        try:
            for parameter in () if self._fused else types:
                parameter.data = parameter.data.float()
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for parameter, dtype in types.items():
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None
                parameter.requires_grad_(False)

    def _moved(self, name: str, by: int) -> str:
        front, rest = self.row.layers, name[len(self.row.layers) + 1 :]
        layer, _, module = rest.partition(".")
        return f"{front}.{int(layer) + by}.{module}"

    def _extended(
        self,
        run: Run,
        trained: Callable[[int], AbstractContextManager[Any]],
        adapted: int,
        above: int,
    ) -> int:
        """The peak over the whole depth, from runs over a few layers: ``adapted`` of one kind, then those above."""
        unit = self.period
        if adapted + above <= 3 * unit:
            return self._peak(run, trained, adapted, above)
        few, some = min(adapted, 2 * unit), min(above, 2 * unit)
        total = float(self._peak(run, trained, few, some))
        # From the second layer on: at the first, less of what came before it is still held.
        if adapted > few:
            more = self._peak(run, trained, 3 * unit, 0) - self._peak(run, trained, 2 * unit, 0)
            total += more * (adapted - few) / unit
        if above > some:
            one = min(adapted, unit)
            more = self._peak(run, trained, one, 3 * unit) - self._peak(run, trained, one, 2 * unit)
            total += more * (above - some) / unit
        return int(total)

    def _peak(self, run: Run, trained: Callable[[int], AbstractContextManager[Any]], adapted: int, above: int) -> int:
        with self._mode, self._cut(adapted + above), trained(adapted) as model:
            there = model if model is not None else self.model
            tensors: list[Tensor] = [*there.parameters(), *there.buffers()]
            tensors += [p.grad for p in there.parameters() if p.grad is not None]
            with LiveBytes(tensors) as live:
                run(there, live)
            self.model.eval()
        return live.peak

    @contextmanager
    def _cut(self, count: int) -> Iterator[None]:
        """The model with its first layers alone."""
        parent, _, name = self.row.layers.rpartition(".")
        holder, config = self.model.get_submodule(parent), language_config(self.model)
        before = config.num_hidden_layers
        setattr(holder, name, nn.ModuleList(list(self.layers)[:count]))
        config.num_hidden_layers = count
        try:
            yield
        finally:
            setattr(holder, name, self.layers)
            config.num_hidden_layers = before


@contextmanager
def _explained(config: dict[str, Any]) -> Iterator[None]:
    # PyTorch logs a failure as an error of its own before it raises it.
    told = logging.getLogger("torch._subclasses.fake_tensor")
    level = told.level
    told.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # models of others' making can fail anywhere on tensors without values
        raise Unplanned(
            f"memory is not planned for {config.get('model_type')} models ({one_line(error, 100)}); runs work all the same"
        ) from error
    finally:
        told.setLevel(level)


def _loss(model: Any, rows: Rows) -> Tensor:
    """What a loss over all positions holds beside the logits, which exist for few positions at a time."""
    ids = torch.zeros(rows.count, rows.length, dtype=torch.long)
    hidden = final_hidden(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    scored = rows.length - 1
    places = torch.arange(scored).repeat(rows.count)
    chosen = hidden[torch.arange(rows.count).repeat_interleave(scored), places]
    # ``soft_divergence`` keeps the gradient with respect to the hidden states, as large as they are.
    return (chosen * torch.empty_like(chosen).detach()).sum()


def _gradients_from_embeddings(model: Any) -> None:
    """Let gradients reach every layer, from the embeddings on."""
    model.enable_input_require_grads()


@contextmanager
def _left_where_made() -> Iterator[None]:
    """Keep peft from moving new adapters to the base's device: pretended parameters cannot be moved, and all have one."""
    moving = nn.Module.to
    setattr(nn.Module, "to", lambda module, *_, **__: module)  # noqa: B010 - mypy refuses a plain assignment
    try:
        yield
    finally:
        setattr(nn.Module, "to", moving)  # noqa: B010


@contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


def _period(layers: Sequence[nn.Module], config: Any) -> int:
    """After how many layers their kinds and shapes repeat; the depth, where they never do."""
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    signs = [
        (kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(kinds, layers, strict=False)
    ]
    for period in range(1, len(layers) // 4 + 1):
        if all(signs[place] == signs[place - period] for place in range(period, len(signs))):
            return period
    return len(layers)


@cache
def _sizes(config: str, dtype: torch.dtype) -> ModelSizes:
    return ModelSizes(parsed_object(config), dtype)


def sizes_of(config: dict[str, Any], dtype: torch.dtype) -> ModelSizes:
    """The sizes of a model; the pretended copy of each configuration is built once."""
    return _sizes(json.dumps(config, sort_keys=True), dtype)
