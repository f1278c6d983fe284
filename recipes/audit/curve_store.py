"""The curves of an audit so far: in its own folder, so that a killed one goes on. Base and controls: in a cache too.

Base, suppressed control and reference are attacked alike in every audit of the same base and concept; the next one
reuses their curves from there. The edited model is always attacked anew.
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

from ...artifacts.checkpoints.tensor_cache import TensorCache
from ...artifacts.files.written import write_whole
from ...eval.audit.recovery import RecoveryCurve

CONTROLS = ("base", "suppressed", "reference")
"""Subjects that the edited model is compared with."""
UNTOUCHED, UTILITY = "untouched", "utility"
"""What is measured without an attack: questions of group V, and questions on everything else."""
PACKAGE = Path(__file__).parents[2]
COMPUTES = ("editing", "eval", "recipes", "artifacts/models")
"""Folders whose code decides what an attack measures."""


@dataclass(frozen=True)
class AttackCurves:
    """Curves by learning rate, and the attackers whose loss stopped being finite."""

    by_rate: dict[float, RecoveryCurve]
    diverged: int

    @classmethod
    def of_one_point(cls, hits: Sequence[float]) -> "AttackCurves":
        """Of a model that nobody trains: one value a question."""
        return cls({0.0: RecoveryCurve((0,), (0,), np.asarray(hits, dtype=float)[None, None])}, 0)

    @property
    def only(self) -> RecoveryCurve:
        """The curve of a model that nobody trained."""
        return self.by_rate[0.0]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        curves = [
            {"rate": rate, "steps": curve.steps, "tokens": curve.tokens, "hits": curve.hits.tolist()}
            for rate, curve in self.by_rate.items()
        ]
        return {"diverged": self.diverged, "by_rate": curves}

    @classmethod
    def of(cls, content: dict[str, Any]) -> "AttackCurves":
        """From what ``describe`` gave."""
        curves = {
            one["rate"]: RecoveryCurve(tuple(one["steps"]), tuple(one["tokens"]), np.asarray(one["hits"], dtype=float))
            for one in content["by_rate"]
        }
        return cls(curves, content["diverged"])


class CurveStore:
    """Curves by subject and attack, each written as soon as it is whole."""

    def __init__(self, folder: Path, earlier: TensorCache | None = None):
        """``earlier`` holds the controls' curves of earlier audits; its scope is all that they depend on."""
        self.folder, self.earlier = folder, earlier
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, subject: str, *names: str) -> bool:
        """Whether all of these are there."""
        return all(self._path(subject, name).exists() for name in names)

    def put(self, subject: str, name: str, curves: AttackCurves, beside: Sequence[str] = ()) -> None:
        """Write one; ``beside`` are the attacks it was made together with, on whose rounding it depends."""
        content = json.dumps(curves.describe())
        if self.earlier and subject in CONTROLS:
            # The cache stores tensors, so the text goes in as bytes.
            encoded = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
            self.earlier.put({"json": encoded}, subject, name, tuple(beside))
        write_whole(self._path(subject, name), content)

    def reuse(self, subject: str, name: str, beside: Sequence[str] = ()) -> None:
        """Take one over from an earlier audit, if that stored it."""
        if self.earlier is None or self.has(subject, name):
            return
        if stored := self.earlier.get(subject, name, tuple(beside)):
            content = json.loads(bytes(stored["json"].tolist()))
            write_whole(self._path(subject, name), json.dumps({**content, "reused": True}))

    def get(self, subject: str, name: str) -> AttackCurves:
        """One of those that are there."""
        return AttackCurves.of(json.loads(self._path(subject, name).read_text(encoding="utf-8")))

    def reused(self) -> list[str]:
        """Subjects of which any curve is an earlier audit's."""
        return [subject for subject in CONTROLS if any(map(_is_reused, self.folder.glob(f"{subject}-*.json")))]

    def _path(self, subject: str, name: str) -> Path:
        return self.folder / f"{subject}-{name}.json"


def _is_reused(path: Path) -> bool:
    return "reused" in json.loads(path.read_text(encoding="utf-8"))


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of all code that decides what an attack measures, in sub-folders too: other code reuses no curves."""
    digest = hashlib.sha256()
    for path in sorted(path for part in COMPUTES for path in (package / part).rglob("*.py")):
        content = path.read_bytes()
        # Names and lengths too, so that code which moves from one file to the next is other code.
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
