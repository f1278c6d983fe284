"""Where products of bfloat16 are made in fp32."""

import torch
from excise.editing.numerics.cpu_products import faster_in_float32


def test_bfloat16_is_widened_where_its_products_are_slower():
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    assert faster_in_float32(weight, 16) == (not torch.cpu._is_amx_tile_supported())
    assert not faster_in_float32(weight, 15)
    assert not faster_in_float32(weight.float(), 16) and not faster_in_float32(weight.to("meta"), 16)
