"""Low-bit storage formats as numbers: packed integers and 4-bit floats unpacked, scales applied by blocks.

Sources: OCP Microscaling Formats 1.0, sections 5.3.3 (e2m1) and 5.4.1 (e8m0); DeepSeek-V3 report, section 3.3.2
(scales by blocks).
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of a 4-bit float: a sign, two bits of exponent, one of mantissa."""
E8M0_BIAS, E8M0_NAN = 127, 255


def unpack_e2m1(packed: UInt8[Tensor, "*n bytes"]) -> Float[Tensor, "*n values"]:
    """Two values a byte, that of the low four bits first."""
    return _looked_up(packed, torch.tensor(E2M1)[_codes_of_bytes(4)])


def unpack_floats(stored: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """8-bit floats in fp32; by their codes, which is five times faster than the conversion of PyTorch."""
    table = torch.arange(256, dtype=torch.uint8).view(stored.dtype).float()
    return _looked_up(stored.view(torch.uint8), table[:, None])


def powers_of_two(exponents: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Scales that are stored as an exponent of 8 bits alone; the code 255 is NaN."""
    # From the bits of an fp32: exp2 is not exact on every processor, and the smallest power is subnormal.
    scales = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents.long() - E8M0_BIAS).float()
    return scales.masked_fill(exponents == E8M0_NAN, torch.nan)


def unpack_integers(packed: Int[Tensor, "rows words"], bits: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Signed integers that stand in 32-bit words with an offset of half their range, the first in the lowest bits.

    Args:
        packed: Words; the first byte of each holds its lowest bits, as in files of safetensors.
        bits: 2, 4 or 8.
        columns: Integers in a row; what the last word holds beyond them is left out.
    """
    table = (_codes_of_bytes(bits) - 2 ** (bits - 1)).float()
    return _looked_up(packed.contiguous().view(torch.uint8), table)[:, :columns]


def _codes_of_bytes(bits: int) -> Int[Tensor, "256 codes"]:
    """The codes that each byte holds, those of the lowest bits first."""
    return (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & (2**bits - 1)


def _looked_up(codes: UInt8[Tensor, "*n bytes"], table: Float[Tensor, "256 of_a_byte"]) -> Float[Tensor, "*n values"]:
    """What the table has for each byte, side by side."""
    found = torch.index_select(table, 0, codes.reshape(-1).int())
    return found.reshape(*codes.shape[:-1], -1)


def by_blocks(
    numbers: Float[Tensor, "r c"], block: tuple[int, int], shape: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """A matrix of ``shape`` in which each number fills a block of ``block`` rows and columns; the last may be cut."""
    rows, columns = shape
    if block == (1, columns) or numbers.numel() == 1:
        return numbers.expand(rows, columns)
    return numbers.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def block_size(
    shape: tuple[int, int], grid: tuple[int, int], given: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns of a block, from a matrix's shape and that of its scales; None where they do not fit each other.

    Args:
        shape: Rows and columns of the matrix.
        grid: Rows and columns of its scales.
        given: What the configuration says of both; only used where neither one scale for all nor one each fits.
    """
    sizes = []
    for axis in (0, 1):
        length, count = shape[axis], grid[axis]
        if count in (0, length, 1):
            size = max(1, length // max(count, 1))
        elif given is not None:
            size = given[axis]
        else:
            size = length // count if length % count == 0 else 0
        if not size or -(-length // size) != count:
            return None
        sizes.append(size)
    return sizes[0], sizes[1]
