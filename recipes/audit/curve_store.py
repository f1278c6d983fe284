"""What an audit found so far: in its own folder, so that a killed one goes on, and of its yardsticks in the cache.

Base, controls and a model that never knew are attacked alike in every audit of the same base and concept; the next one takes
their curves from there. The edited model is always attacked anew.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...artifacts.checkpoints.staging import write_whole
from ...artifacts.checkpoints.tensor_cache import TensorCache
from ...eval.audit.recovery import RecoveryCurve

YARDSTICKS = ("base", "suppressed", "reference")
UNTOUCHED, UTILITY = "untouched", "utility"
"""Names of what is found without an attack."""


@dataclass(frozen=True)
class AttackCurves:
    """Curves by learning rate, and the attackers whose loss stopped being finite."""

    by_rate: dict[float, RecoveryCurve]
    diverged: int

    @classmethod
    def once(cls, hits: Sequence[float]) -> "AttackCurves":
        """A model as it is: a curve of one point."""
        return cls({0.0: RecoveryCurve((0,), (0,), np.asarray(hits, dtype=float)[None, None])}, 0)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "diverged": self.diverged, "by_rate": [
                {"rate": rate, "steps": one.steps, "tokens": one.tokens, "hits": one.hits.tolist()}
                for rate, one in self.by_rate.items()
            ],
        }  # fmt: skip

    @classmethod
    def of(cls, content: dict[str, Any]) -> "AttackCurves":
        """From what ``describe`` gave."""
        curves = {
            one["rate"]: RecoveryCurve(tuple(one["steps"]), tuple(one["tokens"]), np.asarray(one["hits"], dtype=float))
            for one in content["by_rate"]
        }
        return cls(curves, content["diverged"])


class CurveStore:
    """Curves by subject and attack, each kept as soon as it is whole."""

    def __init__(self, folder: Path, kept: TensorCache | None = None):
        """``kept`` holds yardsticks of earlier audits; its scope is all that they depend on."""
        self.folder, self.kept = folder, kept
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, subject: str, *names: str) -> bool:
        """Whether all of these are there."""
        return all(self._path(subject, name).exists() for name in names)

    def put(self, subject: str, name: str, result: AttackCurves, beside: Sequence[str] = ()) -> None:
        """Keep one; ``beside`` are the attacks it was made together with, on whose rounding it depends."""
        content = json.dumps(result.describe())
        if self.kept and subject in YARDSTICKS:
            self.kept.put(
                {"json": torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)}, subject, name, tuple(beside)
            )
        write_whole(self._path(subject, name), content)

    def recall(self, subject: str, name: str, beside: Sequence[str] = ()) -> None:
        """Take it over from an earlier audit, if that kept it."""
        found = self.kept.get(subject, name, tuple(beside)) if self.kept and not self.has(subject, name) else None
        if found:
            content = json.loads(bytes(found["json"].tolist()))
            write_whole(self._path(subject, name), json.dumps({**content, "recalled": True}))

    def get(self, subject: str, name: str) -> AttackCurves:
        """One of those that are there."""
        return AttackCurves.of(self._content(subject, name))

    def recalled(self) -> list[str]:
        """Subjects of which any curve is an earlier audit's."""
        return [
            subject for subject in YARDSTICKS
            if any("recalled" in json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob(f"{subject}-*.json"))
        ]  # fmt: skip

    def _content(self, subject: str, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._path(subject, name).read_text(encoding="utf-8"))
        return content

    def _path(self, subject: str, name: str) -> Path:
        return self.folder / f"{subject}-{name}.json"


@cache
def code_digest() -> str:
    """Of everything here that decides what an attack finds."""
    root = Path(__file__).parents[2]
    files = sorted(path for part in ("editing", "eval", "recipes") for path in (root / part).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
