"""What a model's cache can do: not every kind of layer keeps what it read token by token."""

import inspect
from typing import Any

from transformers import DynamicCache

from ...editing.modules import causal_model


def takes_cache(model: Any) -> bool:
    """Whether the decoder reads on from a cache of keys and values; state-space models keep another kind."""
    parameters = inspect.signature(causal_model(model).base_model.forward).parameters
    return "past_key_values" in parameters and "position_ids" in parameters


def repeats_cache(model: Any) -> bool:
    """Whether a cache can be given to other rows than those that filled it, as a shared beginning needs."""
    if not takes_cache(model):
        return False
    layers = DynamicCache(config=causal_model(model).base_model.config).layers
    return all(hasattr(layer, "batch_repeat_interleave") and hasattr(layer, "batch_select_indices") for layer in layers)
