"""Streaming export: write the edited checkpoint without loading the model.

Declared tensors are edited block by block. All other bytes are copied unchanged, with the base's shards, order and
metadata. Reading, hashing and writing overlap, so the disk limits the speed.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...editing.architectures import architecture_of
from ...editing.edits.base import Plan, Shaped, Shrinking, WeightEdit, check_changes, merge_changes
from ...editing.edits.changes import Change
from ...editing.errors import CheckpointError, EditError, ExciseError
from ...editing.wiring.row import spelled
from ..events import Stage
from ..files.parsed import parsed_object
from .heads import plan_edit, untied
from .read import DTYPES, EDITABLE, INDEX, ITEM_SIZES, Checkpoint, Shard, StoredTensor, as_tensor, mapped, read_tensor
from .side_files import copy_side_files
from .streams import Block, Hasher, Output, one_torch_thread

BLOCK = 2 << 20
"""Bytes of stored weights per block; the fp32 work on a block takes about eight times as much memory."""


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the edited tensors in the new checkpoint, by name."""


@dataclass(frozen=True)
class Export:
    """Result of a streaming export."""

    changes: tuple[Change, ...]
    base_sha256: dict[str, str]
    output_sha256: dict[str, str]
    bytes_written: int
    untied: str | None
    code_left_out: dict[str, list[str]]
    """Code that the base names and that was not copied, by the file that named it."""
    stored_apart: bool
    """Whether the base's config ties unembedding and embedding, while it stores two that differ."""


def required_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of disk space that the export needs."""
    added = checkpoint.tensors[_embedding(checkpoint)].size if plan.untied else 0
    return checkpoint.size + added + (8 << 20)


def check_disk(out: Path, needed: int) -> None:
    """Check that the file system of ``out`` has room for ``needed`` bytes, before anything is written.

    Raises:
        ExciseError: There is too little space.
    """
    place = out.absolute()
    # The folder may not exist yet; its nearest parent that does is on the same disk.
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExciseError(
            f"the export needs {needed / 1e9:.2f} GB, the disk of {out} has {free / 1e9:.2f} GB free; free some space "
            "or give another --out"
        )


def check_editable(checkpoint: Checkpoint, plan: Plan) -> None:
    """Check that all declared tensors are stored in a floating-point type that can be edited.

    Raises:
        CheckpointError: A declared tensor is stored in another type.
    """
    for name in plan.declared:
        dtype = checkpoint.tensors[name].dtype
        if dtype not in EDITABLE:
            raise CheckpointError(
                f"{name} is stored as {dtype}, which cannot be edited; edit a checkpoint in {', '.join(EDITABLE)}, "
                "then quantize"
            )


def check_shapes(checkpoint: Checkpoint, plan: Plan) -> None:
    """Check that a learned edit has the shapes of the tensors that it changes.

    Raises:
        RequestError: It was learned on another model.
    """
    for tensor in plan.tensors:
        if isinstance(tensor, Shaped):
            tensor.check_shape(checkpoint.tensors[tensor.name].shape)


def export_edit(edit: WeightEdit, checkpoint: Checkpoint, folder: Path, stage: Stage | None = None) -> Export:
    """Write the edited checkpoint into ``folder``, an empty staging folder.

    Raises:
        EditError: A weight is NaN or infinite, or the edit changed nothing or an undeclared tensor.
        CheckpointError: A declared tensor is stored quantized.
    """
    plan = plan_edit(edit, checkpoint)
    check_editable(checkpoint, plan)
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    shapes = {
        name: edit.stored_shape(checkpoint.tensors[name].shape)
        if isinstance(edit, Shrinking)
        else checkpoint.tensors[name].shape
        for name, edit in by_name.items()
    }
    embedding = _embedding(checkpoint)
    changes: list[Change] = []
    base_sha256: dict[str, str] = {}
    output_sha256: dict[str, str] = {}

    def other(name: str) -> Tensor:
        return read_tensor(checkpoint.tensors[name])

    def edited(tensor: StoredTensor, descriptor: int, base: Hasher) -> Iterator[Block]:
        parts = []
        edit = by_name[tensor.name]
        for index, matrix in enumerate(_matrices(tensor)):
            read = matrix.reader(descriptor, base)
            stream, row = edit.stream(index, matrix.rows, read, other, matrix.rows_per_block), 0
            for block in stream:
                row, first = row + len(block), row
                if isinstance(edit, Shrinking):
                    block = edit.stored_block(first, matrix.rows, block)
                # numpy has no bfloat16, so blocks leave as unsigned bytes.
                yield block.view(torch.uint8).numpy().reshape(-1).data
            parts.append(stream.change())
        changes.append(merge_changes(tensor.name, parts))

    with one_torch_thread():
        for shard in checkpoint.shards:
            copied = next((tensor for tensor in shard.tensors if plan.untied and tensor.name == embedding), None)
            extra = (plan.untied, copied) if plan.untied and copied else None
            written = _write_shard(shard, folder / shard.path.name, shapes, edited, extra, stage)
            base_sha256[shard.path.name], output_sha256[shard.path.name] = written
    check_changes(plan, changes)
    if checkpoint.index is not None:
        _write_index(checkpoint, folder, plan, embedding, shapes)
    left_out = copy_side_files(
        checkpoint.folder, folder, (untied(checkpoint.config) if plan.unties else {}) | plan.config
    )
    size = sum((folder / shard.path.name).stat().st_size for shard in checkpoint.shards)
    return Export(tuple(changes), base_sha256, output_sha256, size, plan.untied, left_out, plan.stored_apart)


@dataclass(frozen=True)
class _Matrix:
    """One 2-D part of a stored tensor."""

    tensor: StoredTensor
    start: int
    rows: int
    row_bytes: int

    @property
    def rows_per_block(self) -> int:
        return max(1, BLOCK // self.row_bytes)

    def reader(self, descriptor: int, base: Hasher) -> Callable[[int, int], Tensor]:
        """A function that reads rows of the matrix and hashes each row the first time it is read."""
        # An edit may read a matrix twice; the first pass is in file order, as the hash needs it.
        hashed = 0

        def read(first: int, last: int) -> Tensor:
            nonlocal hashed
            data = mapped(descriptor, self.start + first * self.row_bytes, (last - first) * self.row_bytes)
            if first == hashed:
                base.update(data)
                hashed = last
            return as_tensor(data, self.tensor.dtype).reshape(last - first, -1)

        return read


def _matrices(tensor: StoredTensor) -> list[_Matrix]:
    """A bias is one row; fused experts [E, a, b] are E matrices."""
    *lead, columns = tensor.shape
    row_bytes = columns * DTYPES[tensor.dtype].itemsize
    if len(lead) < 2:
        return [_Matrix(tensor, tensor.start, lead[0] if lead else 1, row_bytes)]
    size = lead[1] * row_bytes
    return [_Matrix(tensor, tensor.start + expert * size, lead[1], row_bytes) for expert in range(lead[0])]


def _write_shard(
    shard: Shard,
    target: Path,
    declared: Shapes,
    edited: Any,
    extra: tuple[str, StoredTensor] | None,
    stage: Stage | None,
) -> tuple[str, str]:
    """Write one shard; returns the sha256 of the base's file and of the new one.

    Args:
        declared: Shapes that the edited tensors will have.
        extra: Name of a tensor to add at the end, and the stored one that it copies.
    """
    # An untouched shard is the base's file byte for byte, so it is hashed once.
    touched = extra is not None or any(tensor.name in declared for tensor in shard.tensors)
    with shard.path.open("rb") as source:
        output, base, result = Output(target), Hasher(), Hasher() if touched else None
        try:
            base.update(shard.header)
            for block in _new_blocks(shard, source.fileno(), declared, edited, extra, base):
                output.write(block)
                if result:
                    result.update(block)
                if stage:
                    stage.advance(len(block))
        finally:
            # Also after an error: both threads have to end, and the file has to be closed.
            digest = base.finish()
            digests = digest, result.finish() if result else digest
            output.close()
    return digests


def _new_blocks(
    shard: Shard, descriptor: int, declared: Shapes, edited: Any, extra: tuple[str, StoredTensor] | None, base: Hasher
) -> Iterator[Block]:
    """All bytes of the new shard in order; hashes the base's bytes that are read on the way."""
    yield _header(shard, declared, extra)
    finite = FiniteCheck()
    for tensor in shard.tensors:
        if tensor.name in declared:
            yield from edited(tensor, descriptor, base)
            continue
        for block in _blocks(descriptor, tensor):
            base.update(block)
            if not finite(block, tensor.dtype):
                raise EditError(
                    f"{tensor.name} holds NaN or infinite weights; the base checkpoint is damaged, fetch it again"
                )
            yield block
    if extra:
        yield from _blocks(descriptor, extra[1])


def _blocks(descriptor: int, tensor: StoredTensor) -> Iterator[Block]:
    for start in range(0, tensor.size, BLOCK):
        yield mapped(descriptor, tensor.start + start, min(BLOCK, tensor.size - start))


class FiniteCheck:
    """Whether a stored block is free of NaN and infinities, from its bits."""

    EXPONENTS: ClassVar[dict[str, tuple[Any, int]]] = {
        "BF16": (np.uint16, 0x7F80),
        "F16": (np.uint16, 0x7C00),
        "F32": (np.uint32, 0x7F800000),
    }

    def __init__(self) -> None:
        self._room = np.empty(BLOCK, dtype=np.uint8)

    def __call__(self, block: Block, dtype: str) -> bool:
        if dtype not in self.EXPONENTS or not len(block):
            return True
        # An all-ones exponent means NaN or infinity; on the bits this is twenty times faster than isfinite.
        integer, exponent = self.EXPONENTS[dtype]
        room = self._room[: len(block)].view(integer)
        np.bitwise_and(np.frombuffer(block, dtype=integer), integer(exponent), out=room)
        return int(room.max()) != exponent


def _header(shard: Shard, declared: Shapes, extra: tuple[str, StoredTensor] | None) -> bytes:
    """The new shard's header; the old one, byte for byte, unless a tensor is added or changes its shape."""
    if not extra and all(declared.get(tensor.name, tensor.shape) == tensor.shape for tensor in shard.tensors):
        return shard.header
    header, end = parsed_object(shard.header[8:].decode("utf-8")), 0
    for tensor in shard.tensors:
        shape = declared.get(tensor.name, tensor.shape)
        start, end = end, end + _bytes(tensor, shape)
        header[tensor.name] |= {"shape": list(shape), "data_offsets": [start, end]}
    if extra:
        name, source = extra
        header[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [end, end + source.size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to start at a multiple of 8 bytes; blanks behind the JSON are allowed.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: StoredTensor, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in another shape."""
    if shape == tensor.shape:
        return tensor.size
    return math.prod(shape) * ITEM_SIZES[tensor.dtype]


def _write_index(checkpoint: Checkpoint, folder: Path, plan: Plan, embedding: str, shapes: Shapes) -> None:
    tensors = checkpoint.tensors
    grown = sum(_bytes(tensors[name], shape) - tensors[name].size for name, shape in shapes.items())
    if not plan.untied and not grown:
        shutil.copyfile(checkpoint.folder / INDEX, folder / INDEX)
        return
    assert checkpoint.index is not None
    index = copy.deepcopy(checkpoint.index)
    if plan.untied:
        index["weight_map"][plan.untied] = index["weight_map"][embedding]
        grown += tensors[embedding].size
    # Other counts in the metadata, such as the number of parameters, would be wrong now and are left out.
    if "total_size" in index.get("metadata", {}):
        index["metadata"] = {"total_size": index["metadata"]["total_size"] + grown}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _embedding(checkpoint: Checkpoint) -> str:
    """Name of the token embedding as this checkpoint spells it."""
    row = architecture_of(checkpoint.config)
    name = spelled(row, row.embedding, checkpoint.tensors)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.folder.name} has no tensor {row.embedding}; give a whole model, not a part of one"
        )
    return name
