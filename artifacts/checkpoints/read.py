"""Safetensors checkpoints on disk: reading headers, and checking that the files are complete and safe."""

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ...editing.architectures import architecture_of
from ...editing.errors import CheckpointError, one_line
from ...editing.wiring.row import spelled
from ..files.forms import Form, validated
from ..files.opened import OF_A_CHECKPOINT, Unreadable, regular_file
from ..files.parsed import parsed_object, read_object
from ..files.tensors import open_safetensors
from .adapter_config import check_not_adapter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READ_BY_OTHERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that transformers reads, some of them without a word where they are damaged."""
OPENED = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""Endings of the files that other libraries open in a model's folder."""
_OF_A_SERIES = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
FINITE_BLOCK = 1 << 26
"""Bytes checked at a time; a multiple of every element size."""
MAX_HEADER = 100_000_000
"""Bytes of the largest header that the safetensors library reads."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # PyTorch has had it since 2.7 only; as bytes, it is the exponent plus 127.
    "F8_E8M0": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""Types that may be stored; those outside of ``EDITABLE`` are copied, never edited."""
ITEM_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "vocab_size", "word_embed_proj_dim",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts",
    "moe_intermediate_size",
)  # fmt: skip
"""Config keys that a model's parts are built by; none can be larger than the largest dimension of its tensors."""
EDITABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Position, type and shape of one tensor in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset in the file, header included."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    header: bytes
    """Length field and JSON header, verbatim."""
    tensors: tuple[StoredTensor, ...]
    """In file order."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers, index and shapes were checked; no weight was read yet."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.path.stat().st_size for shard in self.shards)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's config, index and headers.

    Raises:
        CheckpointError: A file is missing, truncated, inconsistent, pickled, or links to a place outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a model folder, a .gguf file, a Hub id or builtin:testbed"
        )
    check_not_adapter(folder)
    config = _read_json(folder / "config.json")
    index_path, single = folder / INDEX, folder / SINGLE
    _check_one_model(folder)
    if index_path.exists():
        index = _read_json(index_path)
        files = _indexed_files(folder, index)
    elif single.exists():
        index, files = None, [single]
    else:
        raise CheckpointError(_no_weights(folder))
    shards = tuple(read_header(_inside(folder, path)) for path in files)
    checkpoint = Checkpoint(folder, config, shards, index)
    if index is not None:
        _check_index(folder, index, shards)
    _check_files(folder)
    _check_sizes(checkpoint)
    return checkpoint


@contextmanager
def open_tensors(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that reads single tensors of a checkpoint, by the parameter's name in memory.

    Raises:
        CheckpointError: The checkpoint is damaged or lacks the tensor.
    """
    checkpoint = open_checkpoint(folder)
    row = architecture_of(checkpoint.config)
    places = {tensor.name: shard.path for shard in checkpoint.shards for tensor in shard.tensors}
    with OF_A_CHECKPOINT.about(folder.name), ExitStack() as stack:
        files = {path: stack.enter_context(open_safetensors(path)) for path in set(places.values())}

        def read(name: str) -> Tensor:
            stored = spelled(row, name, places)
            if stored is None:
                raise CheckpointError(f"{folder.name} has no tensor {name}; give the base that the model was made from")
            tensor: Tensor = files[places[stored]].get_tensor(stored)
            return tensor

        yield read


def read_header(path: Path) -> Shard:
    """Read one safetensors header and check that the tensors fill the file without gaps.

    Raises:
        CheckpointError: The header is damaged, or the file is shorter or longer than the header says.
    """
    with OF_A_CHECKPOINT.about(path.name), regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path.name} is not a safetensors file or is truncated ({size} bytes); fetch it again"
            )
        header = file.read(length)
    try:
        # JSON allows a key twice and Python keeps the last, but another reader may keep the first and load other
        # weights; read strictly, a key occurs once.
        entries = parsed_object(header.decode("utf-8"))
        entries.pop("__metadata__", None)
        unsorted = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    except ValueError as error:
        raise CheckpointError(f"{path.name} has a damaged header ({one_line(error)}); fetch it again") from error
    # Tensors without elements start where the next one does, so the size decides their order.
    tensors = tuple(sorted(unsorted, key=lambda tensor: (tensor.start, tensor.size)))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path.name}: {tensor.name} does not start where the tensor before it ends; fetch it again"
            )
        position += tensor.size
    if position != size:
        word = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(f"{path.name} is {word}: {size} bytes, expected {position}; fetch it again")
    return Shard(path, prefix + header, tensors)


def read_tensor(tensor: StoredTensor) -> Tensor:
    """Read a whole (small) tensor."""
    with tensor.file.open("rb") as file:
        # A clone lets go of the mapped file.
        return as_tensor(mapped(file.fileno(), tensor.start, tensor.size), tensor.dtype).reshape(tensor.shape).clone()


def check_finite(checkpoint: Checkpoint, advance: Callable[[int], None] = lambda _: None) -> None:
    """Read every weight once, block by block, and check that all are finite.

    Args:
        checkpoint: An opened checkpoint.
        advance: Called with the bytes of each tensor, for progress.

    Raises:
        CheckpointError: A tensor holds NaN or infinite values; the message names the first one.
    """
    for shard in checkpoint.shards:
        with shard.path.open("rb") as file:
            for tensor in shard.tensors:
                # torch cannot test 8-bit floats; the 8-bit formats that checkpoints use have no infinity.
                for start in range(0, tensor.size, FINITE_BLOCK) if tensor.dtype in EDITABLE else ():
                    size = min(FINITE_BLOCK, tensor.size - start)
                    values = as_tensor(mapped(file.fileno(), tensor.start + start, size), tensor.dtype)
                    # The sum takes one pass and is not finite if a value is not. It can also overflow, so the exact
                    # test decides.
                    if not torch.isfinite(values.sum(dtype=torch.float64)) and not torch.isfinite(values).all():
                        raise CheckpointError(
                            f"{shard.path.name}: {tensor.name} holds NaN or infinite values; fetch it again, or tell "
                            "its owner"
                        )
                advance(tensor.size)


def as_tensor(data: memoryview, dtype: str) -> Tensor:
    """A flat tensor over a buffer."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])


def mapped(descriptor: int, start: int, size: int) -> memoryview:
    """Bytes of a file without a copy; the memory is freed with the last reference.

    Raises:
        CheckpointError: The file is shorter than its header said when it was opened.
    """
    if size == 0:
        return memoryview(b"")
    # mmap starts at multiples of the page size only.
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        # A private writable mapping: torch warns about read-only buffers.
        pages = mmap.mmap(descriptor, before + size, access=mmap.ACCESS_COPY, offset=start - before)
    except ValueError as error:
        raise CheckpointError("a checkpoint file became shorter while it was read; fetch it again") from error
    return memoryview(pages)[before:]


class _Entry(Form):
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def _entry(path: Path, name: str, content: Any, base: int) -> StoredTensor:
    try:
        entry = validated(_Entry, content)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from error
    if entry.dtype not in ITEM_SIZES:
        raise Unreadable(f"{name} is of the unknown type {entry.dtype!r:.40}; known: {', '.join(ITEM_SIZES)}")
    begin, end = entry.data_offsets
    tensor = StoredTensor(name, entry.dtype, tuple(entry.shape), path, base + begin, end - begin)
    expected = math.prod(entry.shape) * ITEM_SIZES[entry.dtype]
    if tensor.size != expected:
        raise Unreadable(f"{name} has {tensor.size} bytes, its shape {entry.shape} needs {expected}")
    return tensor


def _indexed_files(folder: Path, index: dict[str, Any]) -> list[Path]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{INDEX} has no weight_map; fetch the checkpoint again")
    files = list(dict.fromkeys(names.values()))
    for name in files:
        if Path(name).is_absolute() or Path(name).name != name:
            raise CheckpointError(f"{INDEX} names {name!r}, outside the model's folder; do not use this checkpoint")
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in files if name not in present]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards are missing, the first is {missing[0]}; fetch it again"
        )
    return [folder / name for name in files]


def _check_one_model(folder: Path) -> None:
    """Programs differ in which weights they take from a folder with two sets of them, so such a folder is refused."""
    stored = {path.name for path in folder.iterdir() if path.name == SINGLE or _OF_A_SERIES.fullmatch(path.name)}
    index = _read_json(folder / INDEX) if (folder / INDEX).exists() else None
    named = {path.name for path in _indexed_files(folder, index)} if index is not None else {SINGLE} & stored
    # Without any of them the folder has no weights at all, which is said elsewhere.
    if named and (left := sorted(stored - named)):
        by = f"{INDEX} names {min(named)}" if index is not None else f"{SINGLE} is another whole model"
        raise CheckpointError(
            f"{folder.name} holds the weights of two models: {left[0]} is there and {by}; programs differ in which they"
            f" load, so remove {left[0]}, or the others"
        )
    if index is not None and SINGLE in named and len(named) > 1:
        raise CheckpointError(
            f"{INDEX} names {SINGLE} as one of {len(named)} shards, and transformers loads it as the whole model; save"
            " the checkpoint again"
        )


def _check_index(folder: Path, index: dict[str, Any], shards: tuple[Shard, ...]) -> None:
    listed = {(name, file) for name, file in index["weight_map"].items()}
    stored = {(tensor.name, shard.path.name) for shard in shards for tensor in shard.tensors}
    if listed != stored:
        name = min(listed ^ stored)[0]
        raise CheckpointError(f"{INDEX} and the shards disagree about {name}; fetch the checkpoint again")


def _inside(folder: Path, path: Path) -> Path:
    """Check that a file is inside the folder. Links are allowed into the same model's entry of the Hub's cache."""
    target = path.resolve()
    allowed = [folder.resolve()]
    # The Hub's cache keeps files as links into a folder of blobs beside the snapshots.
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{path.name} is a link out of the model's folder; copy the file in place of the link")
    return path


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{folder.name} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)"
        )
    return f"{folder.name} holds neither {SINGLE} nor {INDEX}; give a folder with a safetensors checkpoint"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}; give a model folder in the transformers format")
    with OF_A_CHECKPOINT.about(path.name):
        return read_object(path)


def _check_files(folder: Path) -> None:
    """Everything that other libraries will open is a file, and what they read as JSON is JSON."""
    for path in sorted(folder.iterdir()):
        with OF_A_CHECKPOINT.about(path.name):
            if path.suffix in OPENED and not path.is_file():
                raise Unreadable("it is a pipe, a device, a folder or a broken link, not a file")
            if path.name in READ_BY_OTHERS:
                read_object(path)


def _check_sizes(checkpoint: Checkpoint) -> None:
    """A model is built by these sizes before any weight is looked at, so a wrong one costs hours and all memory."""
    tensors = checkpoint.tensors.values()
    # Some slack, because packed weights are stored narrower than they are.
    largest = 8 * max((length for tensor in tensors for length in tensor.shape), default=0)
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        for key, value in config.items() if isinstance(config, dict) else ():
            most = len(checkpoint.tensors) if key in LAYERS else largest if key in WIDTHS else None
            if most is None or value is None:
                continue
            # Some architectures state a width for each layer.
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one <= most:
                    raise CheckpointError(
                        f"config.json of {checkpoint.folder.name} states {key} = {one!r:.40}, which its"
                        f" {len(checkpoint.tensors)} tensors do not have; fetch it again"
                    )
