"""Layers that compute what the library's do, in fewer operations and fewer passes over memory.

A small operation costs as much as a large one on a GPU, which starts each by itself, and on small models also on a
processor. Norms, gated layers and attention over packed rows are computed by functions whose backward pass is written out;
what reads the same input is multiplied together. A module gets this where its code is that of one of the classes below,
instruction by instruction, so that nothing has to be believed of it; every other keeps its own.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank_layer import together
from .rms_norm import rms_norm
from .rotary import rotated

Forward = Callable[..., Any]


@contextmanager
def fewer_operations(model: nn.Module) -> Iterator[int]:
    """Let the modules of a model compute so while the context lasts; yields how many do.

    Example:
        >>> with fewer_operations(model) as count:  # doctest: +SKIP
        ...     model(input_ids=ids).logits.sum().backward()
    """
    changed = [(module, forward) for module in model.modules() if (forward := _forward_of(module)) is not None]
    for module, forward in changed:
        module.forward = MethodType(forward, module)
    try:
        yield len(changed)
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def _forward_of(module: nn.Module) -> Forward | None:
    """What a module computes in fewer operations, if it is known what it computes."""
    # Somebody has put another in its place already, such as a library that moves weights as they are read.
    if "forward" in vars(module):
        return None
    return _known().get(_instructions(type(module).forward))


@cache
def _known() -> dict[Any, Forward]:
    """Forwards by the instructions of the library's."""
    known: dict[Any, Forward] = {
        _instructions(_library("llama", "LlamaRMSNorm").forward): _norm,
        _instructions(_library("llama", "LlamaMLP").forward): _gated,
    }
    for family, (name, window) in ATTENTIONS.items():
        known[_instructions(_library(family, name).forward)] = partial(_attention, window)
    return known


def _window_of_config(module: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(module.config, "sliding_window", None)}


def _own_window(module: Any) -> dict[str, Any]:
    return {"sliding_window": module.sliding_window}


ATTENTIONS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "llama": ("LlamaAttention", lambda _: {}),
    "mistral": ("MistralAttention", _window_of_config),
    "qwen2": ("Qwen2Attention", _own_window),
    "qwen3": ("Qwen3Attention", _own_window),
}
"""Families whose attention turns queries and keys by position, and what they tell the attention beside."""


def _library(family: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


@cache
def _instructions(function: Any) -> Any:
    """What a function does, by which copies of it in other modules are known: its code, names and constants, and the same
    of the functions beside it that it calls by name."""
    function = inspect.unwrap(function)
    code = function.__code__
    named = [function.__globals__.get(name) for name in code.co_names]
    beside = [one for one in named if inspect.isfunction(one) and one.__module__ == function.__module__]
    # Among the constants is what a function says of itself.
    constants = tuple(repr(one) for one in code.co_consts if one != function.__doc__)
    return code.co_code, code.co_names, constants, tuple(_instructions(one) for one in beside if one is not function)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        # It is the backward pass that takes long.
        usual: Tensor = type(self).forward(self, hidden_states)
        return usual
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = together([self.gate_proj, self.up_proj], x)
    result: Tensor = self.down_proj(self.act_fn(gate) * up)
    return result


def _attention(
    window: Callable[[Any], dict[str, Any]],
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **how: Any,
) -> tuple[Tensor, Any]:
    if past_key_values is not None or position_embeddings is None:
        usual: tuple[Tensor, Any] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **how
        )
        return usual
    states = _heads(self, together([self.q_proj, self.k_proj, self.v_proj], hidden_states))
    query, key = (rotated(one, *position_embeddings).transpose(1, 2) for one in states[:2])
    output, weights = _interface(self)(
        self,
        query,
        key,
        states[2].transpose(1, 2),
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **window(self),
        **how,
    )
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _heads(self: Any, states: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values by heads [rows, n, heads, d], normed where the family norms them."""
    query, key, value = (one.unflatten(-1, (-1, self.head_dim)) for one in states)
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    return [query, key, value]


def _interface(self: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention that the model is configured to use; its module's own where it is none that is known by a name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = inspect.unwrap(type(self).forward).__globals__["eager_attention_forward"]
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager
    )
    return found
