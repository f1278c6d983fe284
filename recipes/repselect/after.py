"""A step that goes on from another edit: both together are one edit of the base that the other was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...artifacts.checkpoints.manifest import checkpoint_of
from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.checkpoints.read import Checkpoint, open_checkpoint
from ...artifacts.models.find import find_model
from ...artifacts.models.load import LoadedModel
from ...artifacts.models.source import ModelSource
from ...editing.edits.dense import Delta, DenseUpdate
from ...editing.errors import RequestError


@dataclass(frozen=True)
class EditedModel:
    """What a step goes on from."""

    source: ModelSource
    checkpoint: Checkpoint


def edited_model(reference: str, base: Checkpoint) -> EditedModel:
    """An edited model by its reference, checked against the base that it was made from.

    Raises:
        RequestError: There is none, or its tensors are not those of the base.
    """
    source = find_model(reference)
    checkpoint = open_checkpoint(checkpoint_of(source.folder))
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    edited = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    differ = sorted(name for name in shapes.keys() | edited.keys() if shapes.get(name) != edited.get(name))
    if differ:
        raise RequestError(
            f"{len(differ)} tensors, such as {differ[0]}, are in one alone of {source.name} and the base, or of another"
            " shape; give the base that it was made from with --model, or edit it as it stands: --model instead of after"
        )
    return EditedModel(source, checkpoint)


def differences(
    base: LoadedModel, stored: Checkpoint, edited: LoadedModel, edited_stored: Checkpoint
) -> dict[str, Float[Tensor, "rows columns"]]:
    """What the edit before added to each weight that it changed, in fp32 on the CPU, by the parameter's name in memory."""
    of_base, of_edited, found = originals_of(stored, base.model), originals_of(edited_stored, edited.model), {}
    for name, _ in base.model.named_parameters():
        old, new = of_base(name).float(), of_edited(name).float()
        if not torch.equal(old, new):
            # Biases and norms are matrices of one row.
            found[name] = torch.atleast_2d(new - old)
    return found


def together(before: Mapping[str, Tensor], step: DenseUpdate) -> DenseUpdate:
    """The edit before and the step as one edit.

    Example:
        >>> together({"a": torch.ones(1, 1)}, DenseUpdate({"a": Delta(torch.ones(1, 1))}, "llama", 1, 1)).deltas["a"].values
        tensor([[2.]])
    """
    sums = {name: Delta(values) for name, values in before.items()}
    for name, delta in step.deltas.items():
        sums[name] = Delta(before[name] + delta.values) if name in before else delta
    return replace(step, deltas=sums)
