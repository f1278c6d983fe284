"""An audit of a behaviour at work: the models that are attacked, and the controls that are made from the base."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...artifacts.models.load import LoadedModel
from ...artifacts.models.memory import release_memory
from .audit_run import WATCHED, AuditRun, Target
from .behaviours.controls import suppressed, taught
from .behaviours.data import BehaviourData
from .behaviours.items import BehaviourItems
from .behaviours.pairs import PAIRS, Pairs, pairs_of, read_pairs, write_pairs
from .request import ELSEWHERE


def attack_behaviour(audit: AuditRun, subject: str) -> None:
    """Load one model and attack it; the base also as the controls that are made from it."""
    if subject == "base":
        return _attack_base(audit)
    pairs = _pairs(audit, None)
    loaded = audit.loaded(subject)
    audit.attack(Target(subject, loaded.model, _data(audit, subject, loaded, pairs), audit.job.attacks))


def _attack_base(audit: AuditRun) -> None:
    items, attacks = _items(audit), audit.job.attacks
    loaded = audit.loaded("base")
    pairs = _pairs(audit, loaded)
    data = _data(audit, "base", loaded, pairs)
    if not items.kept_out:
        audit.attack(Target("base", loaded.model, data, attacks))
        _attack_suppressed(audit, loaded, data)
    if not audit.reference_is_complete() and audit.wants("reference"):
        floor = _data(audit, "reference", loaded, pairs)
        if audit.job.reference == ELSEWHERE:
            floor = replace(floor, questions=items.without, elsewhere=True)
            floor = replace(floor, formats=floor.in_formats(audit.job.budget.formats))
        audit.attack(Target("reference", loaded.model, floor, attacks))
    if items.kept_out and audit.wants("base", "suppressed"):
        # Its weights are the checkpoint's no longer.
        data = replace(data, own=None)
        with _having(audit, loaded):
            audit.attack(Target("base", loaded.model, data, attacks))
            _attack_suppressed(audit, loaded, data)


def _attack_suppressed(audit: AuditRun, loaded: LoadedModel, data: BehaviourData) -> None:
    """The model that has the behaviour, with an update that hides it: attacks must bring it back."""
    if audit.suppressed_is_complete() or not audit.wants("suppressed"):
        return
    job = audit.job
    with suppressed(loaded.model, data.pairs, job.settings.seed, audit.events, audit.scratch / "suppressed"):
        hidden = replace(data, others=(), own=None)
        audit.attack(Target("suppressed", loaded.model, hidden, job.suppressed_attacks))


def _having(audit: AuditRun, loaded: LoadedModel) -> Any:
    """The base of a task, fine-tuned on the task while the context lasts."""
    folder = audit.scratch / "taught"
    return taught(loaded.model, audit.job.concept, loaded.tokenizer, audit.job.settings.seed, audit.events, folder)


def _data(audit: AuditRun, subject: str, loaded: LoadedModel, pairs: Pairs) -> BehaviourData:
    items, job = _items(audit), audit.job
    data = BehaviourData(
        job.concept,
        items.asked,
        items.others if subject in WATCHED else (),
        loaded.tokenizer,
        job.settings.seed,
        pairs,
        job.sources["base"].folder,
        job.sources[subject if subject in job.sources else "base"].folder,
        tuple((pair.positive, pair.negative) for pair in job.concept.contrast[:128]),
    )
    # Attacks on the base are asked in one format alone.
    return data if subject == "base" else replace(data, formats=data.in_formats(job.budget.formats))


def _pairs(audit: AuditRun, base: LoadedModel | None) -> Pairs:
    """What attackers train on, from the base's replies; made by whoever comes first."""
    path = audit.work / PAIRS
    with audit.curves.claimed("pairs", "made"):
        if not path.exists():
            loaded = base or audit.loaded("base")
            with audit.events.stage("let the base reply"):
                pairs = _made(audit, loaded)
            write_pairs(path, pairs)
            del loaded
            release_memory()
    return read_pairs(path)


def _made(audit: AuditRun, loaded: LoadedModel) -> Pairs:
    items = _items(audit)

    def having(reply: Callable[[Any], Any]) -> Any:
        if not items.kept_out:
            return reply(loaded.model)
        with _having(audit, loaded):
            return reply(loaded.model)

    return pairs_of(items, loaded.model, having, loaded.tokenizer, audit.job.settings.seed)


def _items(audit: AuditRun) -> BehaviourItems:
    assert audit.job.behaviour is not None
    return audit.job.behaviour
