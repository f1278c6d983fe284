"""GGUF files, converted once into an ordinary checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...editing.errors import CheckpointError, one_line
from ..checkpoints.proof import check_proved
from ..checkpoints.read import check_finite, open_checkpoint
from ..checkpoints.side_files import write_for_older_readers
from ..checkpoints.staging import staged_folder
from ..files.opened import OF_A_CHECKPOINT, sha256_of
from ..files.parsed import parsed_object
from .cache import cache_folder
from .filled import check_filled
from .gguf_header import read_gguf_header
from .source import ModelSource


def from_gguf(path: Path, *, to_edit: bool = False) -> ModelSource:
    """Dequantize a GGUF file into a bfloat16 checkpoint in the cache, under the file's hash.

    Args:
        path: The file.
        to_edit: Refuse a type that cannot be edited before its weights are converted.

    Raises:
        UnsupportedArchitecture: An edit of the weights cannot take a direction out of this type.
        CheckpointError: The file is not GGUF or is damaged, or transformers cannot convert it, or leaves a weight out.
    """
    with OF_A_CHECKPOINT.about(path.name):
        read_gguf_header(path)
    digest = sha256_of(path)
    # Folders of other names are older conversions: weights missing from them may be random, and transformers 4 does not
    # read them.
    folder = cache_folder() / f"gguf-portable-{digest[:16]}"
    if not folder.exists():
        # Whole or not at all: a conversion that was killed must not be taken for a model by the next run.
        if to_edit:
            check_proved(_config(path))
        with staged_folder(folder) as staging:
            _dequantize(path, staging)
            try:
                check_finite(open_checkpoint(staging))
            except CheckpointError as error:
                raise CheckpointError(f"{path.name}: {error}") from error
    return ModelSource("gguf", path.name, folder, sha256=digest)


def _config(path: Path) -> dict[str, Any]:
    """The configuration that the file's header describes, as its config.json would hold it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.absolute().parent, **_place(path))
    except Exception as error:  # the libraries behind it raise dozens of kinds
        raise _unconverted(path, error) from error
    return parsed_object(config.to_json_string(use_diff=False))


def _place(path: Path) -> dict[str, Any]:
    # Not resolved where it is used: a link has a name of its own, and what it points to need not end in .gguf.
    return {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}


def _unconverted(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} cannot be converted: {one_line(error)}; give another file or a safetensors folder"
    )


@contextmanager
def _bar_on_a_terminal_alone() -> Iterator[None]:
    """The library's bar stays out of logs; it asks for no setting of its own."""
    from transformers import modeling_gguf_pytorch_utils as library

    bar = getattr(library, "tqdm", None)
    if bar is None:
        yield
        return
    # None: where the stream is no terminal.
    library.tqdm = partial(bar, disable=None)
    try:
        yield
    finally:
        library.tqdm = bar


def _dequantize(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent, place = path.absolute().parent, _place(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(parent, **place)
        with _bar_on_a_terminal_alone():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                parent, dtype=torch.float32, output_loading_info=True, **place
            )
    except Exception as error:  # the libraries behind it raise dozens of kinds
        raise _unconverted(path, error) from error
    model, info = loaded
    check_filled(path.name, info, "fetch the file again, or give another one")
    # The weights are ordinary tensors now, but transformers refuses to save while these attributes exist.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner in (model, model.config):
        for mark in ("quantization_method", "quantization_config", "_pre_quantization_dtype"):
            if mark in vars(owner):
                delattr(owner, mark)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)
