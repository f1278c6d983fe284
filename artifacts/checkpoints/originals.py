"""The original weights of a model in memory, read from its checkpoint, so that no copy of them is held."""

from typing import Any

import torch
from torch import Tensor

from ...editing.architectures import architecture_of
from ...editing.edits.in_place import Originals
from ...editing.wiring.row import spelled
from .read import Checkpoint, read_tensor


def originals_of(checkpoint: Checkpoint, model: Any) -> Originals:
    """Reads the stored values of a parameter by its name in memory.

    A parameter that the checkpoint stores otherwise, such as experts that are joined on loading, is copied when it is first
    asked for; ask before it is edited.

    Example:
        >>> from excise import load_model
        >>> from excise.artifacts.checkpoints.read import open_checkpoint
        >>> from excise.artifacts.models.find import find_model
        >>> model, _ = load_model("builtin:testbed", dtype="float32")
        >>> originals = originals_of(open_checkpoint(find_model("builtin:testbed").folder), model)
        >>> originals("model.norm.weight").dtype
        torch.bfloat16
    """
    row, stored = architecture_of(checkpoint.config), checkpoint.tensors
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    copies: dict[str, Tensor] = {}
    checked: set[str] = set()

    def read(name: str) -> Tensor:
        if name in copies:
            return copies[name]
        parameter, place = parameters[name].detach(), spelled(row, name, stored)
        if place is not None and stored[place].shape == tuple(parameter.shape):
            original = read_tensor(stored[place])
            # Compared once, before anything is edited: some models are changed while they are loaded.
            if name in checked or torch.equal(original.to(parameter.dtype), parameter.cpu()):
                checked.add(name)
                return original
        copies[name] = parameter.to("cpu", copy=True)
        return copies[name]

    return read
