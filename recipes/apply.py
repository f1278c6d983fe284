"""Apply a saved edit or a PEFT adapter to a checkpoint of any size, without loading the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.checkpoints.edits import load_edit, save_edit
from ..artifacts.checkpoints.export import Export, check_disk, check_editable, check_shapes, export_edit, required_bytes
from ..artifacts.checkpoints.heads import plan_edit
from ..artifacts.checkpoints.left import in_words, parts_left
from ..artifacts.checkpoints.manifest import FOLDER, write_manifest
from ..artifacts.checkpoints.proof import check_proved
from ..artifacts.checkpoints.read import Checkpoint, open_checkpoint
from ..artifacts.checkpoints.staging import refuse_existing, staged_folder
from ..artifacts.events import Events
from ..artifacts.models.adapter import PreparedMerge, merge
from ..artifacts.models.find import find_adapter, find_model, prepare_adapter
from ..artifacts.models.source import ModelSource
from ..artifacts.reporting.findings import STORED_APART, code_left_out
from ..editing.edits.base import Plan, WeightEdit
from ..editing.errors import RequestError
from .common.kl_budget import RECORD
from .common.kl_budget import in_words as strength_in_words


@dataclass(frozen=True)
class PreparedApply:
    """An edit and a base that were checked to fit together."""

    edit: WeightEdit
    source: ModelSource
    checkpoint: Checkpoint
    plan: Plan
    out: Path
    merge: PreparedMerge | None = None
    """The adapter that the edit is; None for other edits."""


def prepare(edit: Path | WeightEdit, base: str | None, out: Path) -> PreparedApply:
    """Check that the edit fits the base and the result fits the disk, before any weight is read.

    Args:
        edit: The edit, the folder with its ``edit.json`` and ``edit.safetensors``, or a PEFT adapter's folder or Hub id.
        base: Reference of the checkpoint to edit; None takes the one that an adapter names.
        out: Folder to write.

    Raises:
        RequestError: The edit does not fit the base, there is none, or ``out`` exists.
    """
    refuse_existing(out)
    if isinstance(edit, Path) and (adapter := find_adapter(str(edit))):
        merging = prepare_adapter(adapter, base)
        check_disk(out, required_bytes(merging.checkpoint, merging.plan))
        return PreparedApply(merging.edit, merging.base, merging.checkpoint, merging.plan, out, merging)
    if base is None:
        raise RequestError("base is missing; give --base: a model's folder, a Hub id or a .gguf file")
    edit = load_edit(edit) if isinstance(edit, Path) else edit
    source = find_model(base, to_edit=True)
    checkpoint = open_checkpoint(source.folder)
    check_proved(checkpoint.config)
    plan = plan_edit(edit, checkpoint)
    check_editable(checkpoint, plan)
    check_shapes(checkpoint, plan)
    check_disk(out, required_bytes(checkpoint, plan))
    return PreparedApply(edit, source, checkpoint, plan, out)


def run(prepared: PreparedApply, events: Events) -> Export:
    """Stream the edited checkpoint into ``prepared.out``."""
    with staged_folder(prepared.out) as staging:
        with events.stage("apply", prepared.checkpoint.size) as stage:
            export = (
                merge(prepared.merge, staging, stage)
                if prepared.merge
                else export_edit(prepared.edit, prepared.checkpoint, staging, stage)
            )
        save_edit(prepared.edit, staging / FOLDER)
        (staging / "README.md").write_text(_card(prepared, export), encoding="utf-8")
        write_manifest(
            staging,
            base=prepared.source.describe(),
            base_files=export.base_sha256,
            changes=export.changes,
            untied=export.untied,
            known=export.output_sha256,
            code_left_out=export.code_left_out,
            run={
                "recipe": "apply",
                **({"adapter": prepared.merge.describe()} if prepared.merge else {}),
                **strength_of(prepared),
            },
        )
    return export


def strength_of(prepared: PreparedApply) -> dict[str, Any]:
    """How a KL budget chose the strength, if one did."""
    return {RECORD: prepared.edit.provenance[RECORD]} if RECORD in prepared.edit.provenance else {}


def describe(prepared: PreparedApply) -> dict[str, Any]:
    """What the edit would change, as JSON."""
    sizes = prepared.checkpoint.tensors
    return {
        "base": prepared.source.describe(),
        **({"adapter": prepared.merge.describe()} if prepared.merge else {}),
        "tensors": len(prepared.plan.declared),
        "bytes_edited": sum(sizes[name].size for name in prepared.plan.declared),
        "bytes_written": prepared.checkpoint.size,
        "tensor_added": prepared.plan.untied,
        **({"left": said} if (said := in_words(_left(prepared))) else {}),
    }


def summary(export: Export, out: Path) -> dict[str, Any]:
    """What was changed and written, and the largest share of a removed component that is left."""
    worst = worst_residual(export)
    return {
        "out": str(out),
        "tensors_changed": sum(change.changed for change in export.changes),
        "tensors_declared": len(export.changes),
        "bytes_written": export.bytes_written,
        "code_left_out": export.code_left_out,
        "stored_apart": export.stored_apart,
        "largest_residual": worst[0] if worst else None,
        "largest_residual_tensor": worst[1] if worst else None,
    }


def worst_residual(export: Export) -> tuple[float, str] | None:
    """The largest share of a component that an orthogonalization left, and its tensor; None for other edits."""
    residuals = [(change.residual, change.name) for change in export.changes if change.residual is not None]
    return max(residuals) if residuals else None


def _left(prepared: PreparedApply) -> dict[str, Any]:
    # An adapter says itself what it changes, in models of any type.
    return {} if prepared.merge else parts_left(prepared.checkpoint)


def _card(prepared: PreparedApply, export: Export) -> str:
    changed, worst = sum(change.changed for change in export.changes), worst_residual(export)
    left = (
        f"; at most {worst[0]:.1e} of the written component along the direction is left in any of them" if worst else ""
    )
    more = ""
    what = "A saved edit"
    if prepared.merge:
        about = prepared.merge.describe()
        revision = f" at `{about['revision']}`" if about["revision"] else ""
        what = f"The PEFT adapter `{about['name']}`{revision}"
        if about["own_tokenizer"]:
            more += "The tokenizer is the adapter's. "
    if prepared.source.dequantized_from:
        more += f"The base was dequantized from {prepared.source.dequantized_from} into bfloat16. "
    more += "".join(f"{sentence} " for sentence in in_words(_left(prepared)))
    if chosen := strength_of(prepared):
        more += f"A KL budget chose its strength, {strength_in_words(chosen[RECORD])}. "
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [excise, model-editing]\n---\n"
        f"# {prepared.source.name}, edited\n\n"
        f"**This checkpoint was not measured.** {what} was applied to its base; what it does here is unknown "
        "until\n"
        "`excise eval` is run on it.\n\n"
        f"{changed} of {len(export.changes)} declared tensors changed{left}. {more}"
        "The edit is in `excise/`, the change of every tensor in `excise/manifest.json`.\n"
        + (f"\n{code_left_out(export.code_left_out)}\n" if export.code_left_out else "")
        + (f"\n{STORED_APART}\n" if export.stored_apart else "")
    )
