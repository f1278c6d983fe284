"""A linear layer with a low-rank update, computed in few operations: the library's takes three times as many.

The library's layer casts the input up and the result down, and lets autocast cast them back; on small batches that is
most of the work. Here products are in the type of the layer's output, and the backward pass is written out. A plain frozen
layer is multiplied together with its update, and with those that read the same input (``together``).

Source: LoRA (Hu et al. 2021), equation 3.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics.cpu_products import bfloat16_is_faster
from ..numerics.wide import autocasts
from .low_rank_products import Updated, products


def together(layers: Sequence[nn.Module], x: Float[Tensor, "*n d_in"]) -> list[Float[Tensor, "*n _"]]:
    """What several layers say of one input: products that are shared where all are plain, else each layer is called.

    Example:
        >>> query, key, value = together([block.q_proj, block.k_proj, block.v_proj], x)  # doctest: +SKIP
    """
    parts = [part for layer in layers if (part := _plain_part(layer, x)) is not None]
    shared = len(parts) == len(layers) and len({part.scale for part in parts}) == 1
    return products(x, parts) if shared else [layer(x) for layer in layers]


def _plain_part(layer: Any, x: Tensor) -> Updated | None:
    """What a layer multiplies, where it does no more and nobody looks into it."""
    find = getattr(layer, "plain_part", None)
    return None if find is None or watched(layer) else find(x)


def watched(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what a module reads or says."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module)


def updated(
    output: Float[Tensor, "*n d_out"],
    x: Float[Tensor, "*n d_in"],
    down: Float[Tensor, "r d_in"],
    up: Float[Tensor, "d_out r"],
    scale: float,
) -> Float[Tensor, "*n d_out"]:
    """``output + scale x down^T up^T``, in the type of ``output``.

    Products are in autocast's type where it is on.

    Example:
        >>> updated(linear(x), x, down, up, 2.0).shape == linear(x).shape
        True
    """
    result: Tensor = _Updated.apply(output, x, down, up, scale)
    return result


def _computed_in(output: Tensor) -> torch.dtype:
    device, usual = output.device, output.dtype
    if autocasts(device) and usual != torch.float64:
        return torch.get_autocast_dtype(device.type)
    slow = device.type == "cpu" and usual in (torch.bfloat16, torch.float16) and not bfloat16_is_faster()
    return torch.float32 if slow else usual


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        dtype = _computed_in(output)
        ctx.scale, ctx.shape, ctx.x_dtype, ctx.trained_in = scale, x.shape, x.dtype, down.dtype
        flat, down, up = (part.to(dtype) for part in (x.reshape(-1, x.shape[-1]), down, up))
        # Here and below a narrow factor stands on the left: processors multiply in that order up to four times faster.
        lowered = down @ flat.mT
        ctx.save_for_backward(flat, lowered, down, up)
        result = torch.addmm(output.reshape(-1, output.shape[-1]).to(dtype), lowered.mT, up.mT, alpha=scale)
        return result.to(output.dtype).view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, lowered, down, up = ctx.saved_tensors
        flat_gradient = gradient.reshape(-1, gradient.shape[-1]).to(lowered.dtype)
        of_lowered = (up.mT @ flat_gradient.mT).mul_(ctx.scale)
        of_x = (of_lowered.mT @ down).view(ctx.shape).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        # Summed over positions, which is where the narrow types lose most: scaled afterwards, in the parameters' type.
        of_up = (lowered @ flat_gradient).mT.contiguous().to(ctx.trained_in).mul_(ctx.scale)
        of_down = (of_lowered @ flat).to(ctx.trained_in)
        return gradient if ctx.needs_input_grad[0] else None, of_x, of_down, of_up, None


@cache
def low_rank_layer() -> type[nn.Module]:
    """The library's layer with this computation; imported when it is wanted."""
    from peft.tuners.lora.layer import Linear

    class LowRankLayer(Linear):
        """What the library's layer is, for one plain adapter; in all else it computes as that does."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not self._is_plain():
                computed: Tensor = super().forward(x, *args, **kwargs)
                return computed
            part = self.plain_part(x)
            if part is not None:
                return products(x, [part])[0]
            (name,) = self.active_adapters
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            return updated(self.base_layer(x), x, down, up, self.scaling[name])

        def plain_part(self, x: Tensor) -> Updated | None:
            """Frozen weight and update, where there is nothing else and the input is of the weight's type."""
            frozen: Any = self.base_layer
            plain = type(frozen) is nn.Linear and self._is_plain() and not watched(frozen)
            if not plain or frozen.weight.requires_grad or frozen.weight.dtype != x.dtype:
                return None
            (name,) = self.active_adapters
            # The modules are called by their weights: they are made here, without a bias, and never offloaded.
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            return Updated(frozen.weight, frozen.bias, [down], [up], self.scaling[name])

        def _is_plain(self) -> bool:
            """Whether it is one adapter that is on."""
            names = self.active_adapters
            off = self.disable_adapters or self.merged or self.lora_variant
            return not off and len(names) == 1 and names[0] in self.lora_A

    return LowRankLayer


def plain_layers() -> tuple[type[nn.Module], ...]:
    """The types of frozen layers that it suits: quantized ones are of types of their own."""
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D
