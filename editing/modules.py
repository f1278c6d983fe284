"""Parts of a transformers model by role: the causal model inside a wrapper, linear modules, the unembedding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]
"""Final hidden states [n, d] to logits [n, vocab]."""


def final_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states [batch, positions, d] that the unembedding reads, on the inputs' device; inputs must be
    right-padded."""
    # No position_ids: positions counted from the left are right as long as the padding is on the right.
    hidden: Tensor = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
    # The last layer of a model over several GPUs lies on another one than its first.
    return hidden.to(inputs["input_ids"].device)


def decoder_of(model: nn.Module) -> Any:
    """What a causal language model is without its unembedding."""
    decoder: Any = causal_model(model).base_model
    # A wrapper without a body of its own is its own base_model; its decoder stands inside a whole causal model.
    while decoder.get_output_embeddings() is not None:
        decoder = decoder.language_model if hasattr(decoder, "language_model") else decoder.model
    return decoder


def unembedding(model: nn.Module) -> Head:
    """The function from final hidden states to logits on their device, with the model's scales and softcap."""
    inner, config = causal_model(model), language_config(model)
    head: Any = inner.get_output_embeddings()
    cap, factor = getattr(config, "final_logit_softcapping", None), _logit_factor(config)

    def logits(hidden: Tensor) -> Tensor:
        # Called as a module and never by its weight, which an offloaded model holds only while it runs.
        values: Tensor = head(hidden.to(head.weight.dtype)).to(hidden.device)
        if factor != 1.0:
            values = values * factor
        return values if cap is None else torch.tanh(values / cap) * cap

    return logits


@torch.no_grad()
def unembedding_rows(model: Any, tokens: Sequence[int] | None = None) -> Float[Tensor, "n d"]:
    """Rows of the unembedding of some tokens, or of all, in fp32 on the CPU.

    An offloaded model holds them only while it runs, so they are fetched as its own forward fetches them.
    """
    from accelerate.utils import align_module_device

    head = causal_model(model).get_output_embeddings()
    with align_module_device(head):
        rows: Tensor = head.weight.detach() if tokens is None else head.weight.detach()[list(tokens)]
        return rows.float().cpu()


def _logit_factor(config: Any) -> float:
    """What logits are multiplied by: Cohere and Falcon-H1 multiply, Granite and MiniCPM divide."""
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        factor *= float(getattr(config, name, None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)
    if getattr(config, "dim_model_base", None):
        factor *= config.dim_model_base / config.hidden_size
    return factor


def language_config(model: Any) -> Any:
    """The configuration of the language model itself, which models of several kinds nest."""
    config: Any = causal_model(model).config
    return config.get_text_config(decoder=True)


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
