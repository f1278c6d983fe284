"""Everything that ``eval.json`` holds of a run beside its measurements."""

from typing import Any

from ...artifacts.checkpoints.export import Export
from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.checkpoints.left import parts_left
from ...editing.edits.base import WeightEdit
from ...eval.items import measured_on
from .kl_budget import RECORD
from .measured_job import Job, derived_row
from .settings import as_flags


def run_content(
    job: Job,
    edit: WeightEdit,
    export: Export,
    about: dict[str, Any],
    inspection: dict[str, Any],
    shown: list[dict[str, str]],
) -> dict[str, Any]:
    """Everything in ``eval.json`` but the measurements; the same run on the same machine gives the same bytes."""
    settings, concept = job.settings, job.concept
    strength = {key: value for key, value in edit.provenance.items() if key == RECORD}
    published_settings = settings.published("model", "concept", "out", "device", "dtype", "reference", "fresh")
    return {
        "base": {**job.source.describe(), "computed_in": job.dtype_name},
        **derived_row(job.proof),
        "edited": {
            "method": job.recipe,
            "edit": edit.method,
            "tied": plan_edit(edit, job.checkpoint).tied,
            "tensors_declared": len(export.changes),
            **({"parts_left": left} if (left := parts_left(job.checkpoint)) else {}),
            "tensors_changed": sum(c.changed for c in export.changes),
            "bytes": export.bytes_written,
            **({"code_left_out": export.code_left_out} if export.code_left_out else {}),
            **({"stored_apart": True} if export.stored_apart else {}),
            **about.get("edited", {}),
        },
        "reference": None if job.reference is None else job.reference.describe(),
        "concept": {
            "ref": concept.ref,
            "name": concept.about.name,
            "kind": concept.about.kind,
            "description": concept.about.description,
            "license": concept.about.license,
            "source": concept.about.source,
            "sha256": concept.sha256,
            "made": list(concept.made),
            "decline_phrases": list(concept.about.decline_phrases),
            "measured_on": measured_on(job.measured),
        },
        **strength,
        **{key: value for key, value in about.items() if key != "edited"},
        **inspection,
        "samples": shown,
        "run": {
            "recipe": job.recipe,
            "seed": settings.seed,
            "budget": {"name": settings.budget, "set": settings.set_by_budget()},
            "settings": published_settings,
            "device": job.device.type,
            "dtype": job.dtype_name,
            **strength,
            "command": _command(job, published_settings),
        },
    }


def _command(job: Job, published_settings: dict[str, Any]) -> str:
    fields = type(job.settings).model_fields
    words = ["excise", "run", job.recipe, "--model", job.source.address, "--concept", job.concept.ref]
    words += ["--seed", str(job.settings.seed)]
    chosen = {k: value for k, value in published_settings.items() if k != "seed" and value != fields[k].default}
    return " ".join([*words, *as_flags(chosen)])
