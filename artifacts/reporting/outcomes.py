"""Outcomes of a run, an evaluation and an audit: read from results, shown in a terminal, a notebook or as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...editing.errors import RequestError, nearest
from ...eval.statistics import Measurement
from ..upgrade import read_json
from .audit_page import best, estimate, headline_of, tokens
from .findings import findings
from .pages import render
from .results import RESULTS, Row, format_difference, format_value, read_measurements, table
from .terminal import aligned, bullets, terminal_width

SHOWN_SAMPLES = 4
"""Prompts with both replies that a notebook shows, and that an evaluation holds."""


@dataclass(frozen=True)
class Run:
    """A finished run: the edited checkpoint, and what was measured on it."""

    folder: Path
    """Holds ``checkpoint/`` and ``report.html``."""
    results: dict[str, Any] = field(repr=False)
    """The content of ``eval.json``."""
    base: str | None = None
    """Reference of the model that was edited; None where the record names a local folder only in part."""
    concept: str | None = None
    """Reference of the concept pack; None where the record names a local folder only in part."""

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read a finished run from its folder.

        Raises:
            RequestError: The folder holds no finished run.
        """
        path = Path(folder)
        file = path / "checkpoint" / RESULTS
        if not file.is_file():
            raise RequestError(
                f"{path} holds no finished run (no checkpoint/{RESULTS}); give the --out folder of a run"
            )
        results = read_json(file)
        concept = results["concept"]["ref"]
        return cls(
            path, results, published_reference(results["base"]), concept if concept.startswith("builtin:") else None
        )

    @property
    def checkpoint(self) -> Path:
        """The edited model, in the format of transformers."""
        return self.folder / "checkpoint"

    @property
    def report(self) -> Path:
        """The page with all figures, which opens offline."""
        return self.folder / "report.html"

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings; of a local path, the last part."""
        return dict(self.results["run"]["settings"])

    @property
    def measurements(self) -> list[Measurement]:
        """Every value of every model, with its interval."""
        return read_measurements(self.results)

    @property
    def table(self) -> list[Row]:
        """The measurements side by side: one row for each, with base and edited."""
        return table(self.measurements)

    @property
    def findings(self) -> list[str]:
        """What the figures say, one sentence for each thing, the main one first."""
        return findings(self.results)

    def measurement(self, name: str, split: str, subject: str = "edited") -> Measurement:
        """One value with its interval.

        Raises:
            RequestError: It was not measured.
        """
        return _pick(self.measurements, name, split, subject)

    def as_json(self) -> dict[str, Any]:
        """What ``excise run --json`` prints."""
        return {"out": str(self.folder), **self.results}

    def __str__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _shown(self) -> "Shown":
        title = f"{self.results['run']['recipe']}: {self.folder}"
        return Shown(title, self.findings, *_table_of(self.table), self.results["samples"][:SHOWN_SAMPLES])


@dataclass(frozen=True)
class EvaluationRow:
    """One measurement on a split, for every model."""

    name: str
    split: str
    label: str
    unit: str
    better: str
    n: int
    base: Measurement | None
    models: dict[str, Measurement | None]
    """By model name; None where it was not measured."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Measurements of one or several models on the same items."""

    results: tuple[dict[str, Any], ...]
    """One for each model, as ``eval.json`` would hold it."""

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(self.names)}: {len(self.table)} measurements)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models, in the order in which they were given; a name that comes again gets a number."""
        names: list[str] = []
        for result in self.results:
            name, number = str(result["edited"]["name"]), 2
            while name in names:
                name, number = f"{result['edited']['name']} ({number})", number + 1
            names.append(name)
        return tuple(names)

    @property
    def table(self) -> list[EvaluationRow]:
        """One row for each measurement, with the base and every model."""
        tables = [{(row.name, row.split): row for row in table(read_measurements(r))} for r in self.results]
        # Reversed, so that the first model which has a row describes it.
        first = {key: row for rows in reversed(tables) for key, row in rows.items()}
        order = list(dict.fromkeys(key for rows in tables for key in rows))
        return [
            EvaluationRow(
                *key,
                first[key].label,
                first[key].unit,
                first[key].better,
                first[key].n,
                first[key].base,
                {
                    name: rows[key].edited if key in rows else None
                    for name, rows in zip(self.names, tables, strict=True)
                },
            )
            for key in order
        ]

    def measurement(self, name: str, split: str, model: str | None = None) -> Measurement:
        """One value with its interval.

        Args:
            name: Of the measurement; ``excise list measurements`` shows all.
            split: Which items: ``forget_V``, ``retain``, ``concept``, ``neutral`` and so on.
            model: Name of the model; the first one by default, and ``base`` for the base.

        Raises:
            RequestError: It was not measured, or there is no such model.
        """
        if model is None or model == "base":
            return _pick(read_measurements(self.results[0]), name, split, model or "edited")
        if model not in self.names:
            names = [*self.names, "base"]
            raise RequestError(f"no model {model!r}{nearest(model, names)}; models: {', '.join(names)}")
        return _pick(read_measurements(self.results[self.names.index(model)]), name, split, "edited")

    def as_json(self) -> dict[str, Any]:
        """What ``excise eval --json`` prints: of one model its results, of several a list of them."""
        return dict(self.results[0]) if len(self.results) == 1 else {"models": [dict(r) for r in self.results]}

    def __str__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _shown(self) -> "Shown":
        rows = self.table
        based = any(row.base for row in rows)
        columns = [
            *(["base"] if based else []),
            *self.names,
            *(["difference"] if based and len(self.names) == 1 else []),
        ]
        cells = []
        for row in rows:
            values = [*([format_value(row.base)] if based else []), *(format_value(m) for m in row.models.values())]
            if based and len(self.names) == 1:
                values.append(format_difference(row.models[self.names[0]]))
            cells.append([row.label, row.split, str(row.n), *values])
        title = f"{', '.join(self.names)} on {self.results[0]['concept']['name']}"
        samples = self.results[0].get("samples", [])[:SHOWN_SAMPLES] if len(self.names) == 1 else []
        warnings = list(dict.fromkeys(line for one in self.results for line in one.get("warnings", ())))
        return Shown(title, warnings, ["measurement", "split", "n", *columns], cells, samples)


@dataclass(frozen=True)
class AttackRow:
    """One attack on all models: the best accuracy on group V that it reached."""

    name: str
    about: str
    tier: int
    """0 changes no weight, 1 learns an input, 2 fine-tunes."""
    base: float
    edited: float
    reference: float
    """Of a model that never learned the concept."""
    regained: dict[str, Any]
    """Share of the way from reference to base that the edited model comes back: value, ci95."""
    leak: dict[str, Any]
    """Accuracy above the reference: value, ci95."""
    n: int


@dataclass(frozen=True, repr=False)
class Audit:
    """A finished audit: what attacks recovered, and the verdict."""

    folder: Path
    """Holds ``audit.json``, ``report.html`` and ``card.md``."""
    results: dict[str, Any]
    """The content of ``audit.json``."""

    def __repr__(self) -> str:
        return f"Audit({self.verdict}, {len(self.results['attacks'])} attacks)"

    @property
    def verdict(self) -> str:
        """One word; ``headline`` says it as a sentence."""
        return str(self.results["verdict"])

    @property
    def headline(self) -> str:
        """The verdict as a sentence."""
        return headline_of(self.results)

    @property
    def reasons(self) -> list[str]:
        """Why the verdict is what it is, the main reason first."""
        return list(self.results["reasons"])

    @property
    def gaps(self) -> list[str]:
        """What was not tested."""
        return list(self.results["gaps"])

    @property
    def notes(self) -> list[str]:
        """What of the pack was asked and read, where its files do not say it: questions made of texts, for example."""
        return list(self.results.get("notes", []))

    @property
    def table(self) -> list[AttackRow]:
        """One row for each attack."""
        return [
            AttackRow(
                attack["name"],
                attack["about"],
                attack["tier"],
                base=_most(attack, "base"),
                edited=_most(attack, "edited"),
                reference=_most(attack, "reference"),
                regained=attack["regained"],
                leak=attack["rtt_leak"],
                n=attack["n"],
            )
            for attack in self.results["attacks"]
        ]

    @property
    def report(self) -> Path:
        """The page with all curves, which opens offline."""
        return self.folder / "report.html"

    def as_json(self) -> dict[str, Any]:
        """What ``excise audit --json`` prints."""
        return {"out": str(self.folder), **self.results}

    def __str__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _shown(self) -> "Shown":
        untouched = [f"{self.results['untouched'][subject]:.3f}" for subject in ("base", "edited", "reference")]
        rows = [["none", *untouched, "", "", ""]]
        for attack in self.results["attacks"]:
            values = [best(attack, subject) for subject in ("base", "edited", "reference")]
            reached = tokens(attack, "t50") if len(attack["curve"]) > 1 else ""
            rows.append([attack["name"], *values, estimate(attack["regained"]), estimate(attack["rtt_leak"]), reached])
        header = ["attack", "base", "edited", "never learned", "share regained", "leak", "tokens to 50%"]
        sentences = [*self.reasons, *(f"Asked and read: {note}" for note in self.notes)]
        sentences += [f"Not tested: {gap}" for gap in self.gaps]
        return Shown(self.headline, sentences, header, rows)


@dataclass(frozen=True)
class Shown:
    """An outcome as a person sees it."""

    title: str
    sentences: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    samples: Sequence[dict[str, Any]] = ()

    def html(self) -> str:
        """A part of a page, as a notebook shows it."""
        return render("outcome.html.j2", **{field.name: getattr(self, field.name) for field in fields(self)})

    def text(self) -> str:
        """Lines that fit the terminal, as ``print`` shows them."""
        width = terminal_width()
        parts = (self.title, bullets(self.sentences, width), aligned(self.header, self.rows, width))
        return "\n\n".join(part for part in parts if part)


def _most(attack: dict[str, Any], subject: str) -> float:
    """The highest accuracy of a subject under an attack."""
    return max(float(point[subject]) for point in attack["curve"])


def published_reference(model: dict[str, Any]) -> str | None:
    """How a command names a model that a record describes; None for a local one, whose place no record has."""
    # An adapter's reference leads to the same model only where it is merged into the same base.
    adapter = model.get("adapter")
    if adapter and (adapter["base"]["name"] != adapter["trained_on"] or not published_reference(adapter["base"])):
        return None
    if model["kind"] not in ("builtin", "hub") and not (adapter and model["revision"]):
        return None
    return f"{model['name']}@{model['revision']}" if model["revision"] else str(model["name"])


def _pick(measurements: Sequence[Measurement], name: str, split: str, subject: str) -> Measurement:
    by_name = {(item.name, item.split): item for item in measurements if item.subject == subject}
    if (name, split) not in by_name:
        known = [f"{one}/{other}" for one, other in by_name]
        raise RequestError(
            f"{name}/{split} was not measured on {subject}{nearest(f'{name}/{split}', known)}; measured:"
            f" {', '.join(known)}"
        )
    return by_name[name, split]


def _table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a run's table."""
    referenced = any(row.reference for row in rows)
    header = ["measurement", "split", "n", "base", "edited", "difference", *(["never learned"] if referenced else [])]
    cells = [
        [
            row.label,
            row.split,
            str(row.n),
            row.base_text,
            format_value(row.edited),
            format_difference(row.edited),
            *([format_value(row.reference)] if referenced else []),
        ]
        for row in rows
    ]
    return header, cells
