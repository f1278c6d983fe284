"""Streaming dequantization: a quantized checkpoint written in bfloat16, one block of rows or one expert at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...editing.errors import CheckpointError
from ..files.opened import OF_A_CHECKPOINT
from ..files.parsed import parsed_object, read_object
from .export import BLOCK, FiniteCheck, copy_side_files
from .quantized import Quantized, Weight
from .read import INDEX, Checkpoint, Shard, StoredTensor, mapped
from .streams import Block, Output, one_torch_thread


def bytes_needed(checkpoint: Checkpoint, quantized: Quantized) -> int:
    """Bytes of disk space that the checkpoint takes in bfloat16."""
    kept = sum(tensor.size for tensor in checkpoint.tensors.values() if tensor.name not in quantized.dropped)
    return kept + sum(_size(weight) for weight in quantized.weights.values()) + (8 << 20)


def write_dequantized(checkpoint: Checkpoint, quantized: Quantized, folder: Path, name: str) -> None:
    """Write a checkpoint in bfloat16 into ``folder``, an empty staging folder.

    Tensors that were not quantized are copied bit for bit. Each weight goes into the shard that held its values.

    Raises:
        CheckpointError: A weight is NaN or infinite once it is scaled.
    """
    # Weights keep their values' place: a scale may lie in any shard.
    owners = {weight.parts["values"].name: weight for weight in quantized.weights.values()}
    places: dict[str, str] = {}
    with one_torch_thread():
        for shard in checkpoint.shards:
            entries = [owners.get(tensor.name, tensor) for tensor in shard.tensors]
            kept = [e for e in entries if isinstance(e, Weight) or e.name not in quantized.dropped]
            # A shard of scales alone has nothing left.
            if not kept:
                continue
            places |= {entry.name: shard.path.name for entry in kept}
            output = Output(folder / shard.path.name)
            try:
                for block in _shard(shard, kept, name):
                    output.write(block)
            finally:
                output.close()
    if checkpoint.index is not None:
        total = sum((folder / file).stat().st_size for file in set(places.values()))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_side_files(checkpoint.folder, folder, {})
    _write_config(folder / "config.json")


def _shard(shard: Shard, entries: list[StoredTensor | Weight], name: str) -> Iterator[Block]:
    header: dict[str, Any] = {}
    metadata = parsed_object(shard.header[8:].decode("utf-8")).get("__metadata__")
    if metadata:
        header["__metadata__"] = metadata
    end = 0
    for entry in entries:
        size = _size(entry)
        dtype = "BF16" if isinstance(entry, Weight) else entry.dtype
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    with shard.path.open("rb") as source:
        for entry in entries:
            if isinstance(entry, Weight):
                yield from _weight(entry, name)
                continue
            for start in range(0, entry.size, BLOCK):
                yield mapped(source.fileno(), entry.start + start, min(BLOCK, entry.size - start))


def _weight(weight: Weight, name: str) -> Iterator[Block]:
    finite = FiniteCheck()
    for rows in weight.blocks():
        data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if not finite(block, "BF16"):
                raise CheckpointError(
                    f"{name}: {weight.name} is NaN or infinite once its scale is applied; fetch the checkpoint again"
                )
            yield block


def _size(entry: StoredTensor | Weight) -> int:
    if isinstance(entry, StoredTensor):
        return entry.size
    return 2 * torch.Size(entry.shape).numel()


def _write_config(path: Path) -> None:
    """The configuration of a model in full precision."""
    with OF_A_CHECKPOINT.about(path.name):
        content = read_object(path)
    for place in (content, content.get("text_config")):
        if isinstance(place, dict):
            for key in ("quantization_config", "compression_config"):
                place.pop(key, None)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
