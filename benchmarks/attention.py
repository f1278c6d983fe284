"""Milliseconds of attention by matrix products, against torch's fused kernel in bfloat16 and in float32.

    python benchmarks/attention.py [--rounds 15]

One layer of SmolLM2-135M: 9 heads, 3 groups of keys and values, width 64. Forward alone, and forward with backward, for
texts, lines, and single tokens after long texts. All inputs are bfloat16; *float32* casts them and the result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from excise.editing.numerics.cpu_attention import attention
from excise.recipes.common.memory import keep_freed_memory
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS, GROUPS, WIDTH = 9, 3, 64
SHAPES = {"texts": (4, 200, 200), "lines": (16, 20, 20), "next tokens": (24, 1, 330)}
"""Rows, queries and keys."""


def main() -> None:
    """Print medians of interleaved rounds, and ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    keep_freed_memory()  # As the commands do.
    ways = {"products": _products, "fused": _fused, "float32": partial(_fused, dtype=torch.float32)}
    print(f"{'ms':30}" + "".join(f"{name:>18}" for name in ways))
    for name, (rows, queries, keys) in SHAPES.items():
        inputs = [_heads(rows, HEADS, queries), _heads(rows, GROUPS, keys), _heads(rows, GROUPS, keys)]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(rows, 1, -1, -1).contiguous()
        for backward in (False, True) if queries > 1 else (False,):
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds + 2):
                for way, attend in ways.items():
                    times[way].append(_timed(partial(attend, *inputs, mask), inputs if backward else []))
            middle = {way: 1000 * statistics.median(each[2:]) for way, each in times.items()}
            cells = [f"{value:10.2f} ({value / middle['products']:.2f}x)" for value in middle.values()]
            print(f"{name + (', with backward' if backward else ''):30}" + "".join(f"{cell:>18}" for cell in cells))


def _heads(rows: int, heads: int, length: int) -> Tensor:
    return torch.randn(rows, length, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attention(query, key, value, mask, WIDTH**-0.5)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # As transformers does it: a single query's heads stand as queries of their group, else keys and values are
    # repeated.
    if query.shape[2] == 1:
        packed = query.reshape(len(query), GROUPS, HEADS // GROUPS, WIDTH)
        output = scaled_dot_product_attention(packed.to(dtype), key.to(dtype), value.to(dtype), mask)
        return output.to(query.dtype).reshape(query.shape)
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    return scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), mask).to(query.dtype)


def _timed(attend: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    for tensor in inputs:
        tensor.requires_grad_()
    started = time.perf_counter()
    output = attend()
    if inputs:
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    seconds = time.perf_counter() - started
    for tensor in inputs:
        tensor.requires_grad_(False)
    return seconds


if __name__ == "__main__":
    main()
