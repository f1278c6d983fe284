"""Attention of a bfloat16 model that is trained on a processor."""

from typing import Any

import torch
from torch import Tensor, nn

FLOAT32_BACKWARD = "excise_float32_backward"
"""What the implementation is called in a model's configuration, in memory only."""


def train_attention_in_float32(model: Any) -> None:
    """Let a bfloat16 model compute attention in float32 wherever a gradient goes through it.

    On processors the fused kernel's backward is slower in bfloat16 than in float32. Without a gradient nothing
    changes. A model whose attention is not transformers' fused one is left alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, None]:
        own = query.dtype
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            query, key, value = query.float(), key.float(), value.float()
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return output.to(own), None

    AttentionInterface.register(FLOAT32_BACKWARD, attend)
    AttentionMaskInterface.register(FLOAT32_BACKWARD, sdpa_mask)
    model.set_attn_implementation(FLOAT32_BACKWARD)
