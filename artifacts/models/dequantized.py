"""Quantized checkpoints: dequantized once into the cache where their format is read, else left to their library."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...editing.errors import CheckpointError, ExciseError, RequestError, one_line
from ..checkpoints.dequantize import bytes_needed, write_dequantized
from ..checkpoints.export import check_disk
from ..checkpoints.quantized import FORMATS, method_of, quantization_of, read_quantized
from ..checkpoints.read import Checkpoint, open_checkpoint
from ..checkpoints.staging import staged_folder
from ..files.opened import Unreadable, sha256_of
from ..files.parsed import read_object
from .cache import cache_folder
from .memory import check_memory
from .placement import placement_of, spreads
from .source import ModelSource

PACKAGES = {
    "awq": "gptqmodel", "gptq": "gptqmodel optimum", "bitsandbytes": "'excise[bitsandbytes]'", "hqq": "hqq",
    "quanto": "optimum-quanto", "torchao": "torchao", "aqlm": "aqlm", "eetq": "kernels", "higgs": "kernels",
    "vptq": "vptq", "spqr": "spqr_quant", "auto-round": "auto-round", "quark": "amd-quark",
}  # fmt: skip
"""What to install for a quantization method, by ``quant_method``."""
log = logging.getLogger(__name__)


def in_full_precision(source: ModelSource) -> ModelSource:
    """The same model in bfloat16, if its format is fp8, MXFP4 or one of compressed-tensors; else the model itself.

    Raises:
        CheckpointError: The format is one of these in a variant that is not read, or the checkpoint is damaged.
        ExciseError: The disk has too little space.
    """
    try:
        about = quantization_of(read_object(source.folder / "config.json"))
    except (OSError, Unreadable):
        # Whoever opens the folder tells what is wrong.
        return source
    if about is None or method_of(about) not in FORMATS:
        return source
    checkpoint = open_checkpoint(source.folder)
    quantized = read_quantized(checkpoint, source.name)
    assert quantized is not None, "its method is in the table"
    folder = cache_folder() / f"dequantized-{_digest(source)}"
    if not folder.exists():
        check_disk(folder, bytes_needed(checkpoint, quantized))
        log.warning(
            "dequantizing %s from %s into bfloat16, once; the result stays in the cache, %s",
            source.name,
            quantized.format,
            folder,
        )
        # Whole or not at all: a conversion that was killed must not be taken for a model by the next run.
        with staged_folder(folder) as staging:
            write_dequantized(checkpoint, quantized, staging, source.name)
            # It names the licence.
            if (source.folder / "README.md").is_file():
                shutil.copyfile(source.folder / "README.md", staging / "README.md")
    return replace(source, folder=folder, dequantized_from=quantized.format)


def check_loadable(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a model can be loaded: the library of its quantization is here, and the device has the memory.

    Raises:
        RequestError: The library is missing, or cannot run the model on this machine.
        ExciseError: The device has too little memory.
    """
    about = quantization_of(checkpoint.config)
    if about is not None:
        _check_library(about, checkpoint.folder.name, device)
    if not spreads(device):
        check_memory(checkpoint, device, dtype)
        return
    where = placement_of(checkpoint, device, dtype)
    if not where.fits:
        raise ExciseError(
            f"the model needs {where.weights / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}; GPUs and main memory"
            f" have room for {sum(where.room.values()) / 1e9:.1f} GB; use --dtype bfloat16 or a larger machine; `excise"
            " apply` needs no memory for the model"
        )


def _check_library(about: Mapping[str, Any], name: str, device: torch.device) -> None:
    method = method_of(about)
    install = f"pip install {PACKAGES[method]}" if method in PACKAGES else "install the library of that method"
    try:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(dict(about), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, dtype=None)
    except ImportError as error:
        raise RequestError(
            f"{name} stores quantized weights ({method}), whose library is not here: {install}; or give the"
            f" full-precision model ({one_line(error, 120)})"
        ) from error
    except Exception as error:  # each method's own kinds, about machines, versions and options
        raise RequestError(
            f"{name} stores quantized weights ({method}), which cannot be loaded here: {one_line(error, 160)}; {install},"
            " or give the full-precision model"
        ) from error


def check_full_precision(checkpoint: Checkpoint, name: str) -> None:
    """Check that a checkpoint's tensors are the weights themselves, for whoever reads them without loading the model.

    Raises:
        CheckpointError: They are packed in a format that is not read here.
    """
    about = quantization_of(checkpoint.config)
    if about is not None:
        raise CheckpointError(
            f"{name} stores quantized weights ({method_of(about)}), whose tensors cannot be compared or edited; read are"
            f" {', '.join(FORMATS)} and GGUF; dequantize it with its library, save_pretrained, and give that"
        )


def _digest(source: ModelSource) -> str:
    """What the dequantized model depends on."""
    files = sorted(path for path in source.folder.iterdir() if path.is_file())
    # A commit names the content already; hashing a large model takes minutes.
    content = source.revision or {path.name: sha256_of(path) for path in files}
    return hashlib.sha256(json.dumps(["dequantize 1", content], sort_keys=True).encode()).hexdigest()[:16]
