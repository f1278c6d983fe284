"""A linear layer with a low-rank update, computed in few operations: the library's takes three times as many.

The library's layer casts the input up and the result down, and lets autocast cast them back; on small batches that is
most of the work. Here one operation adds the update to the frozen layer's output, in the type that products are computed
in, and the backward pass is written out. On a processor in fp32, where there are many positions, update and frozen weight
are summed first: one product then does the work of both.

Source: LoRA (Hu et al. 2021), equation 3.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def updated(
    output: Float[Tensor, "*n d_out"],
    x: Float[Tensor, "*n d_in"],
    down: Float[Tensor, "r d_in"],
    up: Float[Tensor, "d_out r"],
    scale: float,
) -> Float[Tensor, "*n d_out"]:
    """``output + scale x down^T up^T``, in the type of ``output``.

    Products are in autocast's type where it is on, and in that of ``down`` elsewhere.

    Example:
        >>> updated(linear(x), x, down, up, 2.0).shape == linear(x).shape
        True
    """
    result: Tensor = _Updated.apply(output, x, down, up, scale)
    return result


def _computed_in(device: torch.device, usual: torch.dtype) -> torch.dtype:
    # Of a kind of device that has no autocast, it cannot be asked whether it is on.
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on and usual != torch.float64 else usual


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        dtype = _computed_in(x.device, down.dtype)
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


class Summed(torch.autograd.Function):
    """``x (weight + scale up down)^T + bias``, with gradients of x and of the update."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        # The sum is as large as the weight, and is formed again in the backward pass.
        ctx.save_for_backward(x, weight, down, up)
        return nn.functional.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        flat, above = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (above @ torch.addmm(weight, up, down, alpha=ctx.scale)).view(x.shape)
        of_down = (up.mT @ above.mT).mul_(ctx.scale) @ flat
        of_up = ((down @ flat.mT) @ above).mT.contiguous().mul_(ctx.scale)
        return of_x, None, None, of_down, of_up, None


def sums_first(layer: Any, x: Tensor, down: Tensor) -> bool:
    """Whether frozen weight and update are summed before the product: that costs what the weight's size is, and saves
    what the positions' is."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or layer.weight.requires_grad:
        return False
    exact = x.dtype == layer.weight.dtype == down.dtype == _computed_in(x.device, down.dtype) == torch.float32
    d_out, d_in = layer.weight.shape
    return exact and x.device.type == "cpu" and x.numel() // d_in * (d_in + d_out) >= 2 * d_in * d_out


@cache
def low_rank_layer() -> type[nn.Module]:
    """The library's layer with this computation; imported when it is wanted."""
    from peft.tuners.lora.layer import Linear

    class LowRankLayer(Linear):
        """What the library's layer is, for one plain adapter; in all else it computes as that does."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            names = self.active_adapters
            plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
            if not plain or len(names) != 1 or names[0] not in self.lora_A:
                computed: Tensor = super().forward(x, *args, **kwargs)
                return computed
            (name,) = names
            # The modules are called by their weights: they are made here, without a bias, and never offloaded.
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            if sums_first(self.base_layer, x, down):
                frozen = self.base_layer
                result: Tensor = Summed.apply(x, frozen.weight, frozen.bias, down, up, self.scaling[name])
                return result
            return updated(self.base_layer(x), x, down, up, self.scaling[name])

    return LowRankLayer


def plain_layers() -> tuple[type[nn.Module], ...]:
    """The types of frozen layers that it suits: quantized ones are of types of their own."""
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D
