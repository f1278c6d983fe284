"""Proving that a model type can be edited: a small copy is saved, edited on disk by its row, and loaded again."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...editing.architectures import architecture_of, layer_count, residual_width
from ...editing.edits.subspace_removal import Edit, Embeddings
from ...editing.errors import EditError, ExciseError, UnsupportedArchitecture, one_line
from ...editing.training.adapters import parts_of
from ...editing.wiring.proof import ENOUGH, Residual, components, random_direction
from ...editing.wiring.row import Architecture
from ...editing.wiring.small_copy import inputs_of, model_class, small_copy
from ..quiet import quiet_libraries
from .export import export_edit
from .read import Checkpoint, open_checkpoint, read_tensor

SHARDS = 3


@dataclass(frozen=True)
class Proof:
    """Whether a model type can be edited, and what was found out about it."""

    model_type: str
    row: Literal["table", "derived"] | None
    """Where the row comes from; None if there is none."""
    proved: bool
    residual: float | None
    """Largest share of a direction's component that is left in the stream after an edit on disk."""
    place: str | None
    """Where most is left."""
    writers: tuple[str, ...]
    units: tuple[str, ...]
    """Units that stand in the same module of every layer: ``neurons``, ``heads``."""
    adaptable: tuple[str, ...]
    """Modules of a layer that adapters can be put on."""
    reason: str | None
    """Why it cannot be edited."""
    transformers: str
    parameters: int
    """Of the small copy."""
    seconds: float

    @classmethod
    def refused(cls, model_type: str, reason: str) -> "Proof":
        """The record of a type that has no row and of which none can be derived."""
        import transformers

        return cls(model_type, None, False, None, None, (), (), (), reason, transformers.__version__, 0, 0.0)


def prove(config: dict[str, Any]) -> Proof:
    """Edit a small copy of a model on disk, and look whether anything of the direction is left when it is loaded again.

    Nothing but the content of ``config.json`` is needed. The copy is stored in several files, edited as every
    checkpoint is, with the embeddings edited and, where they are tied, untied; loaded again, it may have no missing and
    no unexpected tensor, and all other tensors must be what they were, bit by bit.

    Raises:
        UnsupportedArchitecture: No small copy can be built, or its class is unknown.
    """
    import transformers

    start = time.monotonic()
    with quiet_libraries():
        row = architecture_of(config)
        model = small_copy(config)
    residuals, reason = [], None
    choices: tuple[Embeddings, ...] = ("edit", "untie") if _tied(model) else ("edit",)
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="excise-proof-") as place:
        base = _saved(model, Path(place) / "base")
        for choice in choices:
            try:
                residuals.append(_residual(model, base, Path(place) / choice, choice))
            except ExciseError as error:
                reason = one_line(error, 200)
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                # transformers stores and loads a type in its own ways, and some do not come back as they were.
                reason = f"a small copy of it cannot be stored and loaded again ({one_line(error, 120)})"
    worst = max(residuals, key=lambda residual: residual.worst, default=None)
    if worst is not None and worst.worst > ENOUGH and reason is None:
        reason = (
            f"after an edit of every tensor that writes, {worst.place} still holds {worst.worst:.2g} of the direction: "
            "something mixes or norms the stream itself"
        )
    return Proof(
        str(config["model_type"]),
        "derived" if row.derived else "table",
        reason is None,
        worst.worst if worst else None,
        worst.place if worst else None,
        tuple(writer.pattern for writer in row.writers),
        tuple(name for name, units in (("neurons", row.mlp_units), ("heads", row.attention_units)) if units),
        adapted(row),
        reason,
        transformers.__version__,
        sum(parameter.numel() for parameter in model.parameters()),
        round(time.monotonic() - start, 1),
    )


_PROOFS: dict[str, Proof] = {}
"""Proofs that this process made, by configuration."""


def check_proved(config: dict[str, Any]) -> Proof | None:
    """Prove a row that was derived; rows of the table are proved by the tests.

    Raises:
        UnsupportedArchitecture: An edit of the weights cannot take a direction out of this type.
    """
    if not architecture_of(config).derived:
        return None
    key = repr(sorted(config.items()))
    if key not in _PROOFS:
        _PROOFS[key] = prove(config)
    proof = _PROOFS[key]
    if not proof.proved:
        raise UnsupportedArchitecture(f"{proof.model_type} cannot be edited: {proof.reason}")
    return proof


def adapted(row: Architecture) -> tuple[str, ...]:
    """Parts of a layer whose linear modules can carry adapters."""
    return tuple(sorted(parts_of(row, "attention") | parts_of(row, "mlp")))


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _saved(model: Any, folder: Path) -> Checkpoint:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=max(size // SHARDS, 1))
    return open_checkpoint(folder)


def _residual(model: Any, base: Checkpoint, folder: Path, embeddings: Embeddings) -> Residual:
    width, depth = residual_width(base.config), layer_count(base.config)
    direction, inputs = random_direction(width), inputs_of(model)
    edit = Edit(direction[:, None], base.config["model_type"], (1.0,) * depth, embeddings=embeddings)
    plan = edit.plan(base.config, list(base.tensors))
    folder.mkdir()
    export_edit(edit, base, folder)
    edited = open_checkpoint(folder)
    _check_others_kept(base, edited, {*plan.declared, *([plan.untied] if plan.untied else [])})
    loaded, info = model_class(base.config).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise EditError(f"the edited copy, loaded again, has {kind.replace('_', ' ')}: {sorted(info[kind])[:2]}")
    if embeddings == "untie" and not torch.equal(*(m.get_output_embeddings().weight.cpu() for m in (model, loaded))):
        raise EditError("the untied copy, loaded again, does not have the old embedding as its unembedding")
    return Residual(components(model, inputs, direction), components(loaded.eval(), inputs, direction))


def _check_others_kept(base: Checkpoint, edited: Checkpoint, changed: set[str]) -> None:
    if set(edited.tensors) - set(base.tensors) - changed or set(base.tensors) - set(edited.tensors):
        raise EditError("the edited copy has other tensors than the copy")
    for name, stored in base.tensors.items():
        if name not in changed and not torch.equal(
            _bits(read_tensor(stored)), _bits(read_tensor(edited.tensors[name]))
        ):
            raise EditError(f"{name} was changed, and was not to be")


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
