"""Which tensors of a checkpoint in fp8, MXFP4 or the formats of compressed-tensors make up which weight.

A weight's values, scales and zero points are tensors of their own, which may lie in different shards. What is found here
is arithmetic on stored tensors; nothing is loaded by the library that wrote them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ...editing.errors import CheckpointError
from ...editing.numerics.stored_formats import (
    block_size,
    by_blocks,
    powers_of_two,
    unpack_e2m1,
    unpack_floats,
    unpack_integers,
)
from ..files.forms import Form, validated
from ..files.opened import OF_A_CHECKPOINT
from .read import Checkpoint, StoredTensor, read_tensor

FLOATS = ("F8_E4M3", "F8_E5M2")
ROWS = 1024
"""Rows that are dequantized at a time, at least."""
BY_ELEMENT = ("float-quantized", "int-quantized", "naive-quantized", "dense")
"""Formats of compressed-tensors that store one element a value."""
PACKED = "pack-quantized"
OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".activation_scale",
    "_activation_scale", "_activation_scale_inv", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
"""Endings of tensors that quantize activations or the key-value cache; full precision has no use for them."""


@dataclass(frozen=True)
class Weight:
    """One weight and the stored tensors that it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    """By role: values, scale, zero_point, groups."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns that share a scale."""
    bits: int = 8
    """Of a packed integer."""

    def blocks(self) -> Iterator[Tensor]:
        """The weight in bfloat16, in file order, some rows or one expert at a time."""
        if self.kind == "mxfp4":
            yield from self._experts()
            return
        matrices = self.shape[0] if len(self.shape) == 3 else 1
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        step = max(1, ROWS // self.block[0]) * self.block[0]
        for matrix in range(matrices):
            scales = self._scales(matrix)
            for first in range(0, rows, step):
                yield self._rows(matrix, first, min(first + step, rows), scales)

    @property
    def kind(self) -> str:
        return "mxfp4" if self.parts["values"].dtype == "U8" else "elements"

    def _rows(self, matrix: int, first: int, last: int, scales: Tensor) -> Tensor:
        columns = self.shape[-1]
        stored = _slice(self.parts["values"], matrix, first, last)
        if self.parts["values"].dtype == "I32":
            values = unpack_integers(stored, self.bits, columns)
        else:
            values = unpack_floats(stored) if self.parts["values"].dtype in FLOATS else stored.float()
        grid = slice(first // self.block[0], -(-last // self.block[0]))
        if "zero_point" in self.parts:
            values = values - self._wide(self._zero_points()[grid], values)
        return (values * self._wide(scales[grid], values)).bfloat16()

    def _wide(self, numbers: Tensor, values: Tensor) -> Tensor:
        """One number for each value, from one for each block or group."""
        if "groups" in self.parts:
            # The columns of a group need not stand side by side.
            return numbers[:, read_tensor(self.parts["groups"]).long()].expand(len(values), -1)
        return by_blocks(numbers, self.block, (values.shape[0], values.shape[1]))

    def _scales(self, matrix: int) -> Tensor:
        scales = read_scales(self.parts["scale"])
        rows, columns = grid_of(self.parts["scale"].shape, self.shape)
        return scales.reshape(-1, rows, columns)[matrix if scales.numel() > rows * columns else 0]

    def _zero_points(self) -> Tensor:
        stored = read_tensor(self.parts["zero_point"])
        if self.parts["zero_point"].dtype != "I32":
            return stored.float().reshape(grid_of(self.parts["zero_point"].shape, self.shape))
        # Zero points are packed along the rows, not along the columns as the values are.
        rows = -(-self.shape[-2] // self.block[0])
        return unpack_integers(stored.mT, self.bits, rows).mT

    def _experts(self) -> Iterator[Tensor]:
        """MXFP4 [E, out, in / 32, 16] as gpt-oss has it in memory: [E, in, out]."""
        scales = self.parts["scale"]
        for expert in range(self.shape[0]):
            codes = _slice(self.parts["values"], expert, 0, self.shape[2])
            exponents = _slice(scales, expert, 0, self.shape[2])
            values = unpack_e2m1(codes).mul_(powers_of_two(exponents)[..., None])
            yield values.flatten(-2).bfloat16().mT.contiguous()


@dataclass(frozen=True)
class Quantized:
    """A checkpoint in a format that can be read in full precision."""

    format: str
    """As records and messages call it, such as fp8."""
    weights: Mapping[str, Weight]
    """By the name that the weight has in full precision."""
    dropped: frozenset[str]
    """Tensors that full precision has no use for, scales included."""


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's configuration says about quantized weights; None for full precision."""
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key) if isinstance(place, dict) else None
            if isinstance(found, dict) and found:
                return found
    return None


def method_of(about: Mapping[str, Any]) -> str:
    """The name of a quantization method; older bitsandbytes checkpoints do not state it."""
    old = about.get("load_in_4bit") or about.get("load_in_8bit")
    method = about.get("quant_method") or ("bitsandbytes" if old else "unknown")
    return method if isinstance(method, str) else "unknown"


def read_quantized(checkpoint: Checkpoint, name: str) -> Quantized | None:
    """How a checkpoint's weights are made up; None for full precision, and for formats that are not read here.

    Raises:
        CheckpointError: The format is one of those read here but in a variant that is not, or a tensor is missing or
            does not fit.
    """
    about = quantization_of(checkpoint.config)
    if about is None or method_of(about) not in FORMATS:
        return None
    method = method_of(about)
    with OF_A_CHECKPOINT.about(f"{name}/config.json: quantization_config"):
        form = validated(_Stored, about)
    weights, dropped = FORMATS[method](checkpoint, form, name)
    others = [t for t in checkpoint.tensors.values() if t.name not in dropped and t.dtype not in ("F32", "F16", "BF16")]
    others = [tensor for tensor in others if tensor.dtype.startswith("F8") or tensor.dtype in ("U8", "I8")]
    if others:
        raise CheckpointError(
            f"{name} stores {others[0].name} as {others[0].dtype} and no scale for it as {method} has; fetch it again, or"
            " give the full-precision model"
        )
    return Quantized(method, weights, frozenset(dropped))


def grid_of(stored: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of scales: [], [1], [rows], [rows, 1], a grid, or one of these for each expert."""
    if len(stored) >= 2:
        # One number for each expert.
        if len(shape) == 3 and stored[0] == shape[0] and len(stored) == 2 and stored[1] == 1:
            return 1, 1
        return stored[-2], stored[-1]
    count = stored[0] if stored else 1
    return (1, 1) if len(shape) == 3 else (count, 1)


def read_scales(tensor: StoredTensor) -> Tensor:
    """Scales in fp32; those of 8 bits are exponents."""
    stored = read_tensor(tensor)
    return powers_of_two(stored.view(torch.uint8)) if tensor.dtype in ("F8_E8M0", "U8") else stored.float()


def _slice(tensor: StoredTensor, matrix: int, first: int, last: int) -> Tensor:
    """Some rows of one matrix of a stored tensor, without reading the rest."""
    shape = tensor.shape
    lead = 2 if matrix or len(shape) > 2 else 1
    row = tensor.size // max(1, _product(shape[:lead]))
    rows = shape[1] if lead == 2 else shape[0] if shape else 1
    part = StoredTensor(
        tensor.name, tensor.dtype, (last - first, *shape[lead:]), tensor.file,
        tensor.start + (matrix * rows + first) * row, (last - first) * row,
    )  # fmt: skip
    return read_tensor(part)


def _product(lengths: tuple[int, ...]) -> int:
    product = 1
    for length in lengths:
        product *= length
    return product


Found = tuple[dict[str, Weight], set[str]]


Size = Annotated[int, Field(ge=1)]
Pair = Annotated[list[Size], Field(min_length=2, max_length=2)]


class _Weights(Form):
    num_bits: Size | None = None
    block_structure: Pair | None = None


class _Group(Form):
    weights: _Weights | None = None
    format: str | None = None


class _Sparsity(Form):
    format: str | None = "dense"


class _Stored(Form):
    """What is read of a quantization_config."""

    weight_block_size: Pair | None = None
    format: str | None = None
    config_groups: dict[str, _Group] | None = None
    sparsity_config: _Sparsity | None = None
    transform_config: dict[str, Any] | None = None


def _fp8(checkpoint: Checkpoint, about: _Stored, name: str) -> Found:
    """``quant_method: fp8``: X in fp8, and X_scale_inv, by blocks or for the whole tensor."""
    tensors = checkpoint.tensors
    size = about.weight_block_size
    given = (size[0], size[1]) if size else None
    weights = {}
    dropped = {key for key in tensors if key.endswith((*OF_ACTIVATIONS, "_scale_inv"))}
    for tensor in tensors.values():
        if tensor.dtype in FLOATS and tensor.name not in dropped:
            scale = _needed(tensors, f"{tensor.name}_scale_inv", tensor.name, name)
            parts = {"values": tensor, "scale": scale}
            weights[tensor.name] = _weight(tensor.name, tensor.shape, parts, given, name)
            dropped.add(tensor.name)
    return weights, dropped


def _mxfp4(checkpoint: Checkpoint, about: _Stored, name: str) -> Found:
    """gpt-oss: X_blocks [E, out, in / 32, 16] holds two values a byte, X_scales [E, out, in / 32] exponents."""
    tensors, weights, dropped = checkpoint.tensors, {}, set()
    for tensor in tensors.values():
        if tensor.name.endswith("_blocks") and tensor.dtype == "U8":
            weight = tensor.name.removesuffix("_blocks")
            scale = _needed(tensors, f"{weight}_scales", weight, name)
            if len(tensor.shape) != 4 or scale.shape != tensor.shape[:3] or scale.dtype != "U8":
                raise CheckpointError(
                    f"{name}: {tensor.name} is {list(tensor.shape)} and {scale.name} is {list(scale.shape)}, not"
                    " [experts, out, groups, bytes] and [experts, out, groups]; fetch it again"
                )
            experts, outputs, groups, size = tensor.shape
            shape = (experts, groups * size * 2, outputs)
            weights[weight] = Weight(weight, shape, {"values": tensor, "scale": scale})
            dropped |= {tensor.name, scale.name}
    return weights, dropped


def _compressed(checkpoint: Checkpoint, about: _Stored, name: str) -> Found:
    """compressed-tensors: X.weight or X.weight_packed, with weight_scale, weight_zero_point and weight_g_idx."""
    _check_format(about, name)
    groups = [group.weights for group in (about.config_groups or {}).values() if group.weights]
    bits = {group.num_bits for group in groups if group.num_bits}
    tensors, weights = checkpoint.tensors, {}
    dropped = {key for key in tensors if key.endswith(OF_ACTIVATIONS)}
    blocks = {(group.block_structure[0], group.block_structure[1]) for group in groups if group.block_structure}
    given = next(iter(blocks)) if len(blocks) == 1 else None
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        module = key.removesuffix(".weight_scale")
        packed = tensors.get(f"{module}.weight_packed")
        values = packed or _needed(tensors, f"{module}.weight", key, name)
        parts = {"values": values, "scale": tensors[key]}
        helpers = {"zero_point": f"{module}.weight_zero_point", "groups": f"{module}.weight_g_idx"}
        helpers = {role: one for role, one in helpers.items() if one in tensors}
        parts |= {role: tensors[one] for role, one in helpers.items() if role != "groups" or _is_used(tensors[one])}
        shape = _shape_of(packed, tensors, module, name) if packed else values.shape
        if packed and (len(bits) != 1 or not bits <= {2, 4, 8} or packed.dtype != "I32"):
            raise CheckpointError(
                f"{name}: {packed.name} packs integers of {sorted(bits)} bits into {packed.dtype}; read are 2, 4 or 8 bits"
                " in I32; give the full-precision model"
            )
        width = next(iter(bits)) if packed else 8
        weight = f"{module}.weight"
        weights[weight] = _weight(weight, tuple(shape), parts, given, name, width)
        dropped |= {values.name, key, *helpers.values(), f"{module}.weight_shape"}
    return weights, dropped & tensors.keys()


def _check_format(about: _Stored, name: str) -> None:
    formats = {about.format, *(group.format for group in (about.config_groups or {}).values())} - {None}
    sparse = about.sparsity_config.format if about.sparsity_config else None
    unread = sorted(str(one) for one in formats if one not in (*BY_ELEMENT, PACKED))
    if sparse not in (None, "dense"):
        unread.append(f"the sparse format {sparse}")
    if about.transform_config:
        unread.append("transform_config")
    if unread or not formats:
        raise CheckpointError(
            f"{name} is stored by compressed-tensors as {unread[0] if unread else 'no format'}, which is not read;"
            f" formats: {', '.join(BY_ELEMENT)}, {PACKED}; give the full-precision model"
        )


FORMATS = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}
"""By ``quant_method``."""


def _is_used(groups: StoredTensor) -> bool:
    """Whether the numbers of groups are of use; where they are not, each is -1."""
    return groups.size > 1 << 24 or groups.dtype not in ("I32", "I64") or bool((read_tensor(groups) >= 0).all())


def _shape_of(packed: StoredTensor, tensors: Mapping[str, StoredTensor], module: str, name: str) -> tuple[int, ...]:
    """The shape of a packed weight, which is stored beside it."""
    stored = _needed(tensors, f"{module}.weight_shape", packed.name, name)
    shape = tuple(read_tensor(stored).flatten().tolist()) if stored.size < 100 else ()
    if len(shape) != 2 or not all(isinstance(length, int) and length > 0 for length in shape):
        raise CheckpointError(f"{name}: {stored.name} is no shape of a matrix; fetch it again")
    return shape


def _weight(
    weight: str,
    shape: tuple[int, ...],
    parts: Mapping[str, StoredTensor],
    given: tuple[int, int] | None,
    name: str,
    bits: int = 8,
) -> Weight:
    """A weight whose scales, zero points and packed words fit its shape."""
    scale = parts["scale"]
    grid = grid_of(scale.shape, shape)
    plane = ((1, *shape) if len(shape) == 1 else shape)[-2:]
    block = block_size((plane[0], plane[1]), grid, given)
    experts = shape[0] if len(shape) == 3 else 1
    fits = block is not None and len(shape) in (2, 3) and _product(scale.shape) in (1, grid[0] * grid[1] * experts)
    fits = fits and (scale.dtype in ("F32", "F16", "BF16", "F8_E8M0", "U8"))
    if fits and parts["values"].dtype == "I32":
        fits = parts["values"].shape == (plane[0], -(-plane[1] * bits // 32))
    if fits and block and "zero_point" in parts:
        packed = parts["zero_point"].dtype == "I32"
        expected = (-(-grid[0] * bits // 32), grid[1]) if packed else grid
        fits = grid_of(parts["zero_point"].shape, shape) == expected and len(shape) == 2
        fits = fits and parts["zero_point"].dtype in ("I32", "I8", "U8")
    if fits and "groups" in parts:
        fits = parts["groups"].shape == (plane[1],) and parts["groups"].dtype in ("I32", "I64")
        fits = fits and len(shape) == 2 and int(read_tensor(parts["groups"]).max()) < grid[1]
    if not fits or block is None:
        kinds = ", ".join(f"{part} {tensor.dtype} {list(tensor.shape)}" for part, tensor in parts.items())
        raise CheckpointError(f"{name}: {weight} of shape {list(shape)} has {kinds}, which do not fit; fetch it again")
    return Weight(weight, shape, parts, block, bits)


def _needed(tensors: Mapping[str, StoredTensor], key: str, of: str, name: str) -> StoredTensor:
    if key not in tensors:
        raise CheckpointError(f"{name} has no {key}, which {of} is scaled by; fetch it again")
    return tensors[key]
