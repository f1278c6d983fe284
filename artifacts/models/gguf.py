"""GGUF files, converted once into an ordinary checkpoint."""

from pathlib import Path
from typing import Any

import torch

from ...editing.errors import CheckpointError, one_line
from ..checkpoints.manifest import sha256_of
from ..checkpoints.staging import staged_folder
from .cache import cache_folder
from .source import ModelSource


def from_gguf(path: Path) -> ModelSource:
    """Dequantize a GGUF file into a bfloat16 checkpoint in the cache, under the file's hash.

    Raises:
        CheckpointError: The file is not GGUF, or transformers cannot convert it.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file; fetch it again")
    digest = sha256_of(path)
    folder = cache_folder() / f"gguf-{digest[:16]}"
    if not folder.exists():
        # Whole or not at all: a conversion that was killed must not be taken for a model by the next run.
        with staged_folder(folder) as staging:
            _dequantize(path, staging)
    return ModelSource("gguf", path.name, folder, sha256=digest)


def _dequantize(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    parent = path.resolve().parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(parent, **place)
        model: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, **place)
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path.name} cannot be converted: {one_line(error)}; give another file or a safetensors folder"
        ) from error
    # The weights are ordinary tensors now, but transformers refuses to save while these attributes exist.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner in (model, model.config):
        for mark in ("quantization_method", "quantization_config", "_pre_quantization_dtype"):
            if mark in vars(owner):
                delattr(owner, mark)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
