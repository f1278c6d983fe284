"""The curves of an audit so far: in its own folder, so that a killed one goes on. Base and controls: in a cache too.

Base, reference and the controls made of them are attacked alike in every audit of the same base and concept; the next one
reuses their curves from there. The edited model is always attacked anew.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from ...artifacts.checkpoints.tensor_cache import TensorCache
from ...artifacts.files.forms import Form, validated
from ...artifacts.files.locks import Lock
from ...artifacts.files.opened import Telling, Unreadable
from ...artifacts.files.parsed import parsed_object
from ...artifacts.files.written import read_sealed, sealed, unsealed, write_sealed
from ...editing.errors import RequestError
from ...eval.audit.recovery import Curves, RecoveryCurve
from ..common import run_inputs

CONTROLS = ("base", "suppressed", "locked", "removed", "reference")
"""Subjects that the edited model is compared with."""
UNTOUCHED, UTILITY = "untouched", "utility"
"""What is measured without an attack: questions of group V, and questions on everything else."""
OPENED = "opened"
"""Group V of the password-locked control, asked after the password."""
TAUGHT = "taught"
"""Group V of the removal control, while it has what it was taught."""
PACKAGE = Path(__file__).parents[2]
COMPUTES = ("editing", "eval", "recipes", "artifacts/models")
"""Folders whose code decides what an attack measures."""


class _Curve(Form):
    rate: Annotated[float, Field(ge=0)]
    steps: list[Annotated[int, Field(ge=0)]]
    tokens: list[Annotated[int, Field(ge=0)]]
    hits: list[list[list[Annotated[float, Field(ge=-1.001, le=1.001)] | None]]]
    """None where a question could not be asked. Below 0 are differences of two shares; rounding may leave the range."""
    utility: list[list[list[Annotated[float, Field(ge=0, le=1)]]]] | None = None


class _Formats(Form):
    rate: Annotated[float, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    values: dict[str, list[Annotated[float, Field(ge=0, le=1.001)] | None]]


class _Curves(Form):
    diverged: Annotated[int, Field(ge=0)]
    by_rate: list[_Curve]
    formats: _Formats | None = None


@dataclass(frozen=True)
class FormatAnswers:
    """What a model answered in several formats, where an attack gets furthest with it."""

    rate: float
    step: int
    values: dict[str, list[float]]
    """By format, one value a question, 0 to 1; NaN where it could not be asked so."""


@dataclass(frozen=True)
class AttackCurves:
    """Curves by learning rate, and the attackers whose loss stopped being finite."""

    by_rate: dict[float, RecoveryCurve]
    diverged: int
    formats: FormatAnswers | None = None

    @classmethod
    def of_one_point(cls, hits: Sequence[float], formats: dict[str, list[float]] | None = None) -> "AttackCurves":
        """Of a model that nobody trains: one value a question, and those of several formats."""
        return cls({0.0: one_point(hits)}, 0, FormatAnswers(0.0, 0, formats) if formats else None)

    @property
    def only(self) -> RecoveryCurve:
        """The curve of a model that nobody trained."""
        return self.by_rate[0.0]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        curves = [
            {"rate": rate, "steps": curve.steps, "tokens": curve.tokens, "hits": _without_nan(curve.hits)}
            | ({} if curve.utility is None else {"utility": curve.utility.tolist()})
            for rate, curve in self.by_rate.items()
        ]
        asked = {}
        if self.formats:
            values = {name: _without_nan(np.asarray(each)) for name, each in self.formats.values.items()}
            asked = {"formats": {"rate": self.formats.rate, "step": self.formats.step, "values": values}}
        return {"diverged": self.diverged, "by_rate": curves, **asked}

    @classmethod
    def of(cls, content: dict[str, Any]) -> "AttackCurves":
        """From what ``describe`` gave.

        Raises:
            Unreadable: A field is missing or of another form, or hits are not a share for each seed, step and question.
        """
        form = validated(_Curves, content)
        if not form.by_rate:
            raise Unreadable("by_rate holds no curve")
        curves = {}
        for one in form.by_rate:
            if len(one.tokens) != len(one.steps) or not _is_whole(one.hits, len(one.steps)):
                raise Unreadable(f"hits at rate {one.rate} are not one for each seed, step and question")
            asked = None
            if one.utility is not None:
                if len(one.utility) != len(one.hits) or not _is_whole(one.utility, len(one.steps)):
                    raise Unreadable(f"utility at rate {one.rate} is not one hit for each seed, step and question")
                asked = np.asarray(one.utility, dtype=float)
            hits = np.asarray(one.hits, dtype=float)
            curves[one.rate] = RecoveryCurve(tuple(one.steps), tuple(one.tokens), hits, utility=asked)
        return cls(curves, form.diverged, _formats_of(form.formats))


def one_point(hits: Sequence[float], utility: Sequence[float] | None = None) -> RecoveryCurve:
    """The curve of a model that nobody trains."""
    asked = None if utility is None else np.asarray(utility, dtype=float)[None, None]
    return RecoveryCurve((0,), (0,), np.asarray(hits, dtype=float)[None, None], utility=asked)


def _formats_of(form: _Formats | None) -> FormatAnswers | None:
    if form is None:
        return None
    values = {name: [math.nan if value is None else value for value in each] for name, each in form.values.items()}
    if len({len(each) for each in values.values()}) != 1:
        raise Unreadable("formats do not hold one value for each question")
    return FormatAnswers(form.rate, form.step, values)


def _is_whole(hits: Sequence[Sequence[Sequence[float | None]]], steps: int) -> bool:
    """Whether there is one hit for each seed, step and question."""
    shape = {(len(seed), *{len(step) for step in seed}) for seed in hits}
    return len(shape) == 1 and len(*shape) == 2 and min(shape)[0] == steps


def _without_nan(hits: Curves) -> list[Any]:
    """As nested lists; JSON has no NaN."""
    plain = hits.astype(object)
    plain[np.isnan(hits)] = None
    nested: list[Any] = plain.tolist()
    return nested


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
        content = curves.describe()
        if self.earlier and subject in CONTROLS:
            # The cache stores tensors, so the text goes in as bytes.
            encoded = torch.frombuffer(bytearray(sealed(content).encode()), dtype=torch.uint8)
            self.earlier.put({"json": encoded}, subject, name, tuple(beside))
        write_sealed(self._path(subject, name), content)

    @contextmanager
    def claimed(self, subject: str, what: str) -> Iterator[None]:
        """While this lasts, no other process makes the same curves; waits for one that does."""
        path = self.folder / f"{subject}-{what}.lock"
        while (lock := Lock.take(path)) is None:
            time.sleep(1.0)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def alone_at(self, name: str) -> Iterator[bool]:
        """Whether no other worker is at a part of the audit; while this lasts, none begins it."""
        lock = Lock.take(self.folder / f"part-{name}.lock")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def reuse(self, subject: str, name: str, beside: Sequence[str] = ()) -> None:
        """Take one over from an earlier audit, if that stored it."""
        if self.earlier is None or self.has(subject, name):
            return
        if stored := self.earlier.get(subject, name, tuple(beside)):
            try:
                content = unsealed(parsed_object(bytes(stored["json"].tolist()).decode()))
                AttackCurves.of(content)
            except (ValueError, KeyError, TypeError):
                # A cache may lose anything; the attack is made again.
                return
            write_sealed(self._path(subject, name), {**content, "reused": True})

    def get(self, subject: str, name: str) -> AttackCurves:
        """One of those that are there.

        Raises:
            RequestError: It was changed since it was written, or counts other questions than the subject's other curves.
        """
        curves = self._read(subject, name)
        if name not in (UNTOUCHED, UTILITY) and self.has(subject, UNTOUCHED):
            expected = self._read(subject, UNTOUCHED).only.hits.shape[-1]
            if any(curve.hits.shape[-1] != expected for curve in curves.by_rate.values()):
                with self._told(subject, name):
                    raise Unreadable(f"it does not count the {expected} questions that the model was asked before")
        return curves

    def _read(self, subject: str, name: str) -> AttackCurves:
        with self._told(subject, name):
            return AttackCurves.of(read_sealed(self._path(subject, name)))

    def _told(self, subject: str, name: str) -> AbstractContextManager[None]:
        path = self._path(subject, name)
        return Telling(RequestError, "remove this file, and --resume measures it again").about(path)

    def reused(self) -> list[str]:
        """Subjects of which any curve is an earlier audit's."""
        return [subject for subject in CONTROLS if any(map(self._is_reused, self.folder.glob(f"{subject}-*.json")))]

    def _is_reused(self, path: Path) -> bool:
        with self._told(*path.stem.split("-", 1)):
            return "reused" in read_sealed(path)

    def _path(self, subject: str, name: str) -> Path:
        return self.folder / f"{subject}-{name}.json"


def code_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of all code that decides what an attack measures: other code reuses no curves."""
    return run_inputs.code_digest(COMPUTES, package)
