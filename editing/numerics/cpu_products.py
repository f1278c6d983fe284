"""Products of bfloat16 on processors that multiply fp32 faster: operands are widened for one product at a time."""

import torch
from torch import Tensor

FEWEST = 16
"""Positions of a product from which on widening its weight pays, and each is computed alike whatever their number."""


def faster_in_float32(weight: Tensor, positions: int) -> bool:
    """Whether a product with this weight takes less time in fp32, conversions included.

    Without matrix units (AMX), AVX512-BF16 takes 1.5 times as long (``docs/measured.md``). Both add in fp32, in another
    order.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and positions >= FEWEST
        and not torch.cpu._is_amx_tile_supported()
    )
