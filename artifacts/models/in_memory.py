"""A model that the caller holds in memory: measured as it is, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...eval.inference.chat import PromptFormat, format_of, use_format
from ...eval.inference.encoding import within
from .load import LoadedModel, load_model
from .source import ModelInMemory, ModelSource


@contextmanager
def opened(
    source: ModelSource | ModelInMemory, device: torch.device, dtype: torch.dtype, prompts: PromptFormat | None = None
) -> Iterator[LoadedModel]:
    """A model ready to measure: loaded, or the caller's on its own device and in its own dtype.

    Raises:
        CheckpointError: The weights and the configuration do not fit together, or there is no tokenizer.
        ExciseError: The device has too little memory.
    """
    if isinstance(source, ModelSource):
        yield load_model(source, device, dtype, prompts=prompts)
        return
    with ready_to_measure(source.model, source.tokenizer, prompts):
        yield LoadedModel(source.model, source.tokenizer, source)


@contextmanager
def ready_to_measure(model: Any, tokenizer: Any, prompts: PromptFormat | None = None) -> Iterator[None]:
    """Evaluation mode, and a tokenizer that pads on the left; both are put back afterwards."""
    # Modules can be in different modes, as frozen ones are, so each gets its own back.
    modes = [(module, module.training) for module in model.modules()]
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    model.eval()
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    form, rows = format_of(tokenizer), within(tokenizer, model.get_input_embeddings().num_embeddings)
    try:
        use_format(tokenizer, prompts or form)
        yield
    finally:
        use_format(tokenizer, form)
        within(tokenizer, rows)
        tokenizer.padding_side, tokenizer.pad_token = side, pad
        for module, mode in modes:
            module.training = mode
