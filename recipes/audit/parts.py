"""An audit in parts that do not need each other: each is one model and the attacks that must stay together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...editing.errors import RequestError
from .attacks.table import ATTACKS
from .request import MADE_FROM_BASE, AuditJob

UNTRAINED = "untrained"
"""In place of a method: the model as it is, and the attacks that train nothing."""
PARTS = "parts"
"""Folder, in the working folder of an audit, with what its processes tell and their trainers' files."""


@dataclass(frozen=True)
class Part:
    """What one process may do beside others."""

    subject: str
    method: str = ""
    """Attacks that train this, side by side, whose rounding depends on each other; ``UNTRAINED``; empty for all."""

    @property
    def name(self) -> str:
        return f"{self.subject}-{self.method}" if self.method else self.subject

    def events(self, work: Path) -> Path:
        """Where it tells its progress."""
        return work / PARTS / f"{self.name}.jsonl"


def events_of_parts(work: Path) -> list[Path]:
    """What the processes of an audit told so far."""
    return sorted((work / PARTS).glob("*.jsonl"))


def parts_of(job: AuditJob) -> list[Part]:
    """All parts of an audit, those that take longest first."""
    subjects = [*job.sources, *(["reference"] if job.reference in MADE_FROM_BASE else [])]
    methods = [ATTACKS[names[0]].method for names in by_method(job.attacks)]
    trained = [Part(subject, method) for method in methods for subject in subjects]
    controls = [
        *([Part("suppressed")] if job.suppressed_attacks else []),
        *([Part("locked")] if job.locked_attacks else []),
        *([Part("removed")] if job.removed_attacks else []),
    ]
    return [*controls, *trained, *(Part(subject, UNTRAINED) for subject in subjects)]


def part_called(job: AuditJob, name: str) -> Part:
    """The part of a name.

    Raises:
        RequestError: The audit has none of that name.
    """
    parts = {part.name: part for part in parts_of(job)}
    if name not in parts:
        raise RequestError(f"--part {name}: this audit has no such part; parts: {', '.join(parts)}")
    return parts[name]


def by_method(attacks: Sequence[str]) -> list[list[str]]:
    """Attacks that train, those of one method together."""
    training = [name for name in attacks if ATTACKS[name].trains]
    methods = dict.fromkeys(ATTACKS[name].method for name in training)
    return [[name for name in training if ATTACKS[name].method == method] for method in methods]
