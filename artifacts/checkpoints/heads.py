"""The unembedding of a stored checkpoint, where configuration and tensors can disagree about it.

transformers 5 ties the two if the configuration says so, unless both are stored and differ. transformers 4, and vLLM, go
by the configuration alone; llama.cpp by what is stored. An edited checkpoint has to be one model to all of them.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ...editing.architectures import architecture_of
from ...editing.edits.base import Plan, TensorEdit, WeightEdit
from ...editing.edits.subspace_removal import ties_embeddings
from ...editing.errors import CheckpointError
from ...editing.wiring.row import spelled
from .read import Checkpoint, StoredTensor, mapped

_BLOCK = 1 << 24
UNTIED = {"tie_word_embeddings": False}


def plan_edit(edit: WeightEdit, checkpoint: Checkpoint) -> Plan:
    """What an edit will do to a checkpoint.

    A second copy of a tied embedding is edited as the embedding is. Where the two differ, the model is not tied, as
    transformers 5 reads it, and the new configuration says so.

    Raises:
        CheckpointError: The checkpoint stores no embedding, or neither an unembedding nor that it is tied.
        ExciseError: The edit does not fit the checkpoint.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    row = architecture_of(config)
    embedding = spelled(row, row.embedding, tensors)
    named = (spelled(row, row.unembedding, tensors), "lm_head.weight")
    heads = [name for name in dict.fromkeys(named) if name in tensors]
    tied = ties_embeddings(config)
    if embedding is None:
        raise CheckpointError(
            f"{checkpoint.folder.name} stores no {row.embedding}, which the model reads its tokens by; fetch it again"
        )
    if not tied and not heads:
        raise CheckpointError(
            f"{checkpoint.folder.name} stores no {row.unembedding}, and its config.json does not tie it to the embedding:"
            " some programs would fill it at random, others take the embedding; fetch the checkpoint again, or set"
            " tie_word_embeddings to true if that is what it was trained with"
        )
    if not tied or not heads:
        return edit.plan(config, list(tensors))
    if not all(_equal(tensors[embedding], tensors[head]) for head in heads):
        plan = edit.plan({**config, **untied(config)}, list(tensors))
        return replace(plan, unties=True, stored_apart=True)
    plan = edit.plan(config, list(tensors))
    return plan if plan.unties else _edited_twice(plan, embedding, heads)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration has to say anew where the unembedding is no longer the embedding."""
    text = config.get("text_config")
    # Versions differ in which of the two they read.
    nested = {"text_config": {**text, **UNTIED}} if isinstance(text, dict) else {}
    return {**UNTIED, **nested}


def _edited_twice(plan: Plan, embedding: str, heads: list[str]) -> Plan:
    """The plan, with the embedding's edit on its second copy too: the same numbers, so they stay equal."""
    tensors: list[TensorEdit] = list(plan.tensors)
    for tensor in plan.tensors:
        if tensor.name == embedding:
            tensors += [replace(tensor, name=head) for head in heads if head not in plan.declared]  # type: ignore[type-var]
    return replace(plan, tensors=tuple(tensors))


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as first, b.file.open("rb") as second:
        for at in range(0, a.size, _BLOCK):
            size = min(_BLOCK, a.size - at)
            one, other = (
                np.frombuffer(mapped(file.fileno(), tensor.start + at, size), dtype=np.uint8)
                for file, tensor in ((first, a), (second, b))
            )
            if not np.array_equal(one, other):
                return False
    return True
