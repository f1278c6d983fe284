"""Where products of bfloat16 are made in fp32."""

import time

import pytest
import torch
from excise.artifacts.models.load import choose_dtype
from excise.editing.numerics import cpu_products
from excise.editing.numerics.cpu_products import bfloat16_is_faster, faster_in_float32

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """A processor with these instructions, whose product in bfloat16 takes so many times as long as in fp32."""

    def make(amx, avx512, times):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        clock, plain = [0.0], torch.mm

        def product(a, b):
            clock[0] += times if a.dtype == torch.bfloat16 else 1.0
            return plain(a, b)

        monkeypatch.setattr(torch, "mm", product)
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        bfloat16_is_faster.cache_clear()

    yield make
    monkeypatch.undo()
    bfloat16_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("amx", "avx512", "times", "faster"),
    [(True, True, 9.0, True), (False, True, 0.6, True), (False, True, 1.9, False), (False, False, 0.1, False)],
)
def test_a_processor_computes_in_the_type_that_it_multiplies_faster(processor, amx, avx512, times, faster):
    processor(amx, avx512, times)
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if faster else torch.float32)
    # A model that is in bfloat16 all the same has its products made in fp32 there, where there are enough positions.
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    assert faster_in_float32(weight, 16) == (not faster)
    assert not faster_in_float32(weight, cpu_products.FEWEST - 1)
    assert not faster_in_float32(weight.float(), 16) and not faster_in_float32(weight.to("meta"), 16)
