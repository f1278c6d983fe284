"""Applying a saved edit or an adapter at the strength that a KL budget allows; for this alone the base is loaded."""

from dataclasses import replace
from typing import Any

from ..artifacts.checkpoints.heads import plan_edit
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.models.dequantized import check_loadable
from ..artifacts.models.load import choose_device, choose_dtype, load_model
from ..editing.edits.strength import check_has_strength
from ..editing.errors import RequestError
from ..eval.concept import Concept
from .apply import PreparedApply
from .common.kl_budget import Budget, fit


def prepare(prepared: PreparedApply, budget: Budget, concept: str | None, device: str = "auto") -> Concept:
    """Check, before a weight is read, that the edit has a strength, the base fits memory, and there are texts.

    Args:
        concept: The pack whose retain texts the divergence is measured on; None takes the built-in pack that the edit's
            record names.

    Returns:
        The pack.

    Raises:
        RequestError: Anything that could not work.
    """
    if not 0 < budget.nats < float("inf") or not 0 < budget.max_strength <= 64:
        raise RequestError(
            f"--kl-budget {budget.nats:g} --max-strength {budget.max_strength:g}: got a value out of range; allowed: a"
            " budget above 0 nats per token, and a strength above 0, at most 64"
        )
    check_has_strength(prepared.edit)
    pack = load_concept(concept or _recorded(prepared.edit.provenance))
    pack.require("--kl-budget", "retain")
    place = choose_device(device)
    check_loadable(prepared.checkpoint, place, choose_dtype("auto", place))
    return pack


def fitted(
    prepared: PreparedApply, budget: Budget, pack: Concept, events: Events, device: str = "auto"
) -> PreparedApply:
    """The same request with the edit at the strength that the budget allows.

    Raises:
        EditError: No change of the stored weights stays within the budget.
    """
    place = choose_device(device)
    with events.stage("load the base"):
        loaded = load_model(prepared.source, place, choose_dtype("auto", place))
    edit = fit(prepared.edit, budget, loaded, prepared.checkpoint, pack, events)
    plan = plan_edit(edit, prepared.checkpoint)
    merge = replace(prepared.merge, edit=edit, plan=plan) if prepared.merge else None
    return replace(prepared, edit=edit, plan=plan, merge=merge)


def _recorded(provenance: dict[str, Any]) -> str:
    concept = provenance.get("concept")
    ref = concept.get("ref") if isinstance(concept, dict) else None
    if isinstance(ref, str) and ref.startswith("builtin:"):
        return ref
    was = f"was the local folder {ref}" if isinstance(ref, str) else "is not recorded"
    raise RequestError(
        f"--kl-budget measures on the retain texts of a concept pack, and that of the edit {was}; give --concept"
        " builtin:NAME or a folder"
    )
