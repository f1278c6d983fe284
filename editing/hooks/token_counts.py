"""How much a model reads: told position by position, by whatever forward it is read in.

Example:
    >>> seen = collections.Counter()
    >>> count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    >>> model(**pad_right([(1, 2, 3), (1, 2)], model.device))
    >>> seen["tokens"], seen["padding"]
    (6, 1)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import causal_model

Count = Callable[[str, "int | Tensor"], None]
"""Takes what was counted, and how many: a tensor where the device alone knows, so that nothing waits for it."""
TOKENS, PADDING, DIFFERENTIATED, SCORED = "tokens", "padding", "tokens_with_gradient", "positions_scored"
"""What is counted: positions that the layers read, padding among them, those that are read with a gradient, and positions
that go through the unembedding."""


def count_tokens(model: Any, count: Count) -> None:
    """Tell ``count`` of every forward of a causal language model from now on."""
    inner = causal_model(model)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if ids is None or ids.ndim < 2:
            return
        rows, length = ids.shape[:2]
        count(TOKENS, rows * length)
        if torch.is_grad_enabled():
            count(DIFFERENTIATED, rows * length)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            # A cache's tokens stand in front, and are not read again.
            count(PADDING, rows * length - mask[:, -length:].sum())

    def scored(module: nn.Module, args: tuple[Any, ...]) -> None:
        count(SCORED, args[0].numel() // args[0].shape[-1])

    inner.base_model.register_forward_pre_hook(read, with_kwargs=True)
    head = inner.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(scored)
