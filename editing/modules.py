"""Parts of a transformers model by role: the causal model inside a wrapper, linear modules, the unembedding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]
"""Final hidden states [n, d] to logits [n, vocab]."""


def final_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states [batch, positions, d] that the unembedding reads; inputs must be right-padded."""
    # No position_ids: positions counted from the left are right as long as the padding is on the right.
    decoder: Any = causal_model(model).base_model
    hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden


def unembedding(model: nn.Module) -> Head:
    """The function from final hidden states to logits, with the model's softcap if it has one."""
    inner = causal_model(model)
    head: Any = inner.get_output_embeddings()
    cap = getattr(inner.config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden.to(head.weight.dtype))
        return values if cap is None else torch.tanh(values / cap) * cap

    return logits


def causal_model(model: Any) -> Any:
    """The causal language model itself, without the wrapper of an adapter."""
    # Only wrappers of peft have this method.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix product: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D, which stores its weight as [in, out]."""
    # By name, so that nothing of transformers is imported here.
    return type(module).__name__ == "Conv1D"
