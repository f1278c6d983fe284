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
    table = torch.tensor(E2M1)
    return torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(-2)


def powers_of_two(exponents: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Scales that are stored as an exponent of 8 bits alone; the code 255 is NaN."""
    # From the bits of an fp32: exp2 is not exact on every processor, and the smallest power is subnormal.
    scales = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents.long() - E8M0_BIAS).float()
    return scales.masked_fill(exponents == E8M0_NAN, torch.nan)


def unpack_integers(packed: Int[Tensor, "rows words"], bits: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Signed integers that stand in 32-bit words with an offset of half their range, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)[: 32 // bits]
    codes = (packed[..., None].long() >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[:, :columns].float() - 2 ** (bits - 1)


def by_blocks(
    numbers: Float[Tensor, "r c"], block: tuple[int, int], shape: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """A matrix of ``shape`` in which each number fills a block of ``block`` rows and columns; the last may be cut."""
    rows, columns = shape
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
