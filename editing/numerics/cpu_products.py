"""Products of bfloat16 on processors, some of which multiply fp32 faster: there operands are widened for one product."""

import time
from functools import cache

import torch
from torch import Tensor

FEWEST = 16
"""Positions of a product from which on widening its weight pays, and each is computed alike whatever their number."""


@cache
def bfloat16_is_faster() -> bool:
    """Whether this processor takes less time for products in bfloat16 than in fp32.

    Matrix units (AMX) do. Without AVX512-BF16 it takes 60 times as long; with it and without matrix units twice as long on
    some processors (``docs/measured.md``), so that it is tried. Both add in fp32, in another order.

    Example:
        >>> bfloat16_is_faster() in (True, False)
        True
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and _takes_less()


def faster_in_float32(weight: Tensor, positions: int) -> bool:
    """Whether a product with this weight takes less time in fp32, conversions included."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and positions >= FEWEST
        and not bfloat16_is_faster()
    )


def _takes_less(width: int = 512, rounds: int = 5) -> bool:
    """Whether square factors are multiplied faster in bfloat16; takes some 50 ms.

    By one thread, and the least time of each type counts, so that other work on the machine does not.
    """
    least, threads = {torch.bfloat16: float("inf"), torch.float32: float("inf")}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for dtype in (*least, *least) * rounds:
                factor = torch.ones(width, width, dtype=dtype)
                began = time.perf_counter()
                torch.mm(factor, factor)
                least[dtype] = min(time.perf_counter() - began, least[dtype])
    finally:
        torch.set_num_threads(threads)
    return least[torch.bfloat16] < least[torch.float32]
