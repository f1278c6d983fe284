"""Loading weights and tokenizer of a model."""

import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...editing.errors import CheckpointError, ExciseError, RequestError, one_line
from ...editing.hooks.token_counts import count_tokens
from ...editing.numerics.cpu_attention import attend_by_products
from ...editing.numerics.cpu_products import bfloat16_is_faster
from ...editing.wiring.small_copy import model_class
from ...eval.inference.chat import PromptFormat
from ..checkpoints.read import open_checkpoint
from ..events import count
from .chat_template import check_chat_template
from .dequantized import check_loadable
from .filled import check_filled
from .memory import release_memory
from .placement import Placement, placement_of
from .source import ModelInMemory, ModelSource
from .tokenizer_files import EXTRA, check_ids, missing_package

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, and its tokenizer (left padding)."""

    model: Any
    tokenizer: Any
    source: ModelSource | ModelInMemory

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_model(
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bits: Literal[4, 16] = 16,
    prompts: PromptFormat | None = None,
) -> LoadedModel:
    """Load a model in evaluation mode, from safetensors only, without remote code, and with exactly its tensors.

    Args:
        source: A model that ``find_model`` returned.
        device: Where to put it.
        dtype: What it computes in.
        bits: 16 for ``dtype``; 4 quantizes to bitsandbytes NF4 while loading, on a GPU.
        prompts: How prompts are put into the chat template; None takes the default.

    Raises:
        CheckpointError: The weights and the configuration do not fit together, or there is no tokenizer.
        RequestError: The chat template knows no variable that ``prompts`` sets.
        ExciseError: The device has too little memory.
    """
    tokenizer = load_tokenizer(source, prompts)
    return LoadedModel(load_weights(source, device, dtype, bits=bits), tokenizer, source)


def load_weights(source: ModelSource, device: torch.device, dtype: torch.dtype, *, bits: Literal[4, 16] = 16) -> Any:
    """The same without a tokenizer: the model alone.

    Raises:
        CheckpointError: The weights and the configuration do not fit together.
        ExciseError: The device has too little memory.
    """
    # The model before it may be gone but not freed, and memory may have room for one only.
    release_memory()
    checkpoint = open_checkpoint(source.folder)
    check_loadable(checkpoint, device, dtype)
    where = placement_of(checkpoint, device, dtype)
    try:
        loaded: Any = model_class(checkpoint.config).from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **_placed(bits, device, dtype, where),
        )
    except Exception as error:  # odd values in the configuration raise dozens of kinds
        raise CheckpointError(
            f"{source.name} cannot be loaded: {one_line(error)}; fetch the checkpoint again"
        ) from error
    model, info = loaded
    check_filled(source.name, info, "fetch the checkpoint again")
    check_usable(model, source.name)
    if bits == 16 and where.room:
        log.warning(where.sentence(source.name))
    if device.type == "cpu" and dtype == torch.bfloat16:
        attend_by_products(model)
    count_tokens(model, count)
    return model.eval()


def _placed(bits: int, device: torch.device, dtype: torch.dtype, where: Placement) -> dict[str, Any]:
    """Weights go to the device as they are read, so that main memory never holds a GPU's model."""
    if bits == 16 and where.room:
        # The library's own planner, which keeps layers whole and tied weights together.
        return {"device_map": "auto", "max_memory": dict(where.room)}
    if bits == 16:
        return {"device_map": {"": device}}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


@torch.no_grad()
def check_usable(model: Any, name: str) -> None:
    """Check that a model computes where its inputs would be put, and numbers in its type.

    Raises:
        ExciseError: Its first weights have no place on a GPU, or it overflows in float16.
    """
    if model.device.type == "meta":
        raise ExciseError(
            f"the embedding of {name} alone is too large for the first GPU; use a larger GPU or --device cpu"
        )
    if model.dtype != torch.float16:
        return
    # Models that were trained in bfloat16 may pass 65504, the largest number of float16; then all they say is NaN.
    logits = model(input_ids=torch.arange(1, 9, device=model.device)[None], use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise ExciseError(
            f"{name} overflows in float16, so that it computes no numbers; use --dtype float32 or bfloat16"
        )


def load_tokenizer(source: ModelSource, prompts: PromptFormat | None = None) -> Any:
    """The model's tokenizer, with left padding; the end token pads if there is no pad token.

    Raises:
        RequestError: Its chat template knows no variable that ``prompts`` sets.
        CheckpointError: The folder has no usable tokenizer, or a chat template that loops or fails.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its own kinds, and a bare Exception for a damaged tokenizer.json
        if missing := missing_package(source.folder):
            raise CheckpointError(
                f"{source.name} has no usable tokenizer: {missing}; install it with `pip install '{EXTRA}'`, or save"
                " the tokenizer as tokenizer.json once, where the package is"
            ) from error
        raise CheckpointError(
            f"{source.name} has no usable tokenizer: {one_line(error)}; add its tokenizer files"
        ) from error
    check_ids(tokenizer, source.folder, source.name)
    check_chat_template(tokenizer, source.name, prompts or PromptFormat())
    # Replies are generated, and new tokens must come directly after the prompt's last one.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device; only ``cuda:N`` keeps to one of several GPUs.

    Raises:
        RequestError: The name is none of these, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise RequestError(f"device {name!r} is unknown; give auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RequestError(
            "device mps is the GPU of a Mac with Apple silicon, and this machine has none; give auto or cpu"
        )
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {name} does not exist, this machine has {torch.cuda.device_count()} GPUs; give auto or cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``auto``, ``float32``, ``bfloat16`` or ``float16`` into a dtype.

    ``auto`` is bfloat16 where it is faster; otherwise float16 on a CUDA GPU (T4, V100) and float32 elsewhere.

    Raises:
        RequestError: The name is none of these, or the device does not compute in it.
    """
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        other = torch.float16 if device.type == "cuda" else torch.float32
        return torch.bfloat16 if bfloat16_is_fast(device) else other
    if name not in choices:
        raise RequestError(f"dtype {name!r} is unknown; give auto, float32, bfloat16 or float16")
    if name == "bfloat16" and device.type == "mps":
        raise RequestError("bfloat16 is not native to the GPU of every Mac; use --dtype float16 or float32 on mps")
    return choices[name]


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, and a processor faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bfloat16_is_faster()
