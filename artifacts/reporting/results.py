"""``eval.json`` and the one table that terminal, card and report all show."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...eval.inference.generation import Reply
from ...eval.statistics import Measurement, Scores, summarize
from ..checkpoints.manifest import FOLDER
from ..upgrade import SCHEMA_VERSION

RESULTS = f"{FOLDER}/eval.json"
SubjectName = Literal["base", "edited", "reference"]

LABELS: dict[str, str] = {
    "learned_rate": "shows what was trained",
    "exact_answer": "right answers",
    "behaviour_rate": "declines",
    "induced_rate": "shows the concept when the direction is added",
    "multiple_choice": "multiple choice",
    "multiple_choice_margin": "margin of the true choice",
    "cloze": "log-probability of the answer",
    "cloze_rank": "rank of the answer",
    "cloze_exact": "answers that are the greedy choice",
    "extraction_strength": "share of a text completed exactly",
    "probe": "linear probe, best layer",
    "probe_control": "linear probe, shuffled answers",
    "reverse_perplexity": "perplexity of replies under the base",
    "distinct_2": "distinct word pairs",
    "repetition": "repeated word quadruples",
    "on_topic": "replies on topic",
    "degenerate_share": "empty or repeating replies",
    "kl_from_base": "KL from base",
    "perplexity": "perplexity",
}
BY_LAYER = "probe_at_layer"
"""Kept out of the table; its split is the layer."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a measurement on a split, for every subject."""

    name: str
    split: str
    label: str
    unit: str
    better: str
    n: int
    skipped: int
    base: Measurement | None
    edited: Measurement | None
    reference: Measurement | None


def summarize_all(scores: Mapping[SubjectName, Sequence[Scores]]) -> list[Measurement]:
    """Every value with its interval; edited and never with their paired difference from the base."""
    base = {(item.name, item.split): item for item in scores.get("base", ())}
    return [
        summarize(item, subject, None if subject == "base" else base.get((item.name, item.split)))
        for subject, items in scores.items()
        for item in items
    ]


def table(measurements: Sequence[Measurement]) -> list[Row]:
    """Measurements side by side, in the order in which they matter."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for item in measurements:
        if item.name != BY_LAYER:
            found.setdefault((item.name, item.split), {})[item.subject] = item
    order = list(LABELS)
    rows = []
    for (name, split), subjects in sorted(found.items(), key=lambda entry: (_place(order, entry[0][0]), entry[0][1])):
        some = next(iter(subjects.values()))
        rows.append(
            Row(
                name, split, LABELS.get(name, name.replace("_", " ")), some.unit, some.better, some.n,
                max(item.skipped for item in subjects.values()),
                subjects.get("base"), subjects.get("edited"), subjects.get("reference"),
            )
        )  # fmt: skip
    return rows


def layers_probed(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Probe accuracy at each layer, by subject."""
    found: dict[str, dict[str, Any]] = {}
    for item in measurements:
        if item.name == BY_LAYER:
            found.setdefault(item.split, {"layer": int(item.split)})[item.subject] = item
    return [found[split] for split in sorted(found)]


def format_value(item: Measurement | None) -> str:
    """A value with its interval."""
    if item is None:
        return ""
    return f"{_figure(item.value)} [{_figure(item.ci95[0])}, {_figure(item.ci95[1])}]"


def format_difference(item: Measurement | None) -> str:
    """A difference from the base with its interval."""
    if item is None or item.difference is None:
        return ""
    low, high = item.difference["ci95"]
    return (
        f"{_figure(item.difference['value'], signed=True)} [{_figure(low, signed=True)}, {_figure(high, signed=True)}]"
    )


def samples(base: dict[str, list[Reply]], edited: dict[str, list[Reply]], count: int) -> list[dict[str, str]]:
    """Prompts with both models' replies, the first ``count`` of each split."""
    return [
        {"split": split, "prompt": before.prompt, "base": before.text, "edited": after.text}
        for split in base
        for before, after in list(zip(base[split], edited[split], strict=True))[:count]
    ]


def write_results(folder: Path, content: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Write ``excise/eval.json`` into a folder and return what was written."""
    whole = {"schema_version": SCHEMA_VERSION, **content, "measurements": measurements_as_json(measurements)}
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def measurements_as_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements as plain data."""
    return [_as_json(item) for item in measurements]


def read_measurements(content: dict[str, Any]) -> list[Measurement]:
    """The measurements of an ``eval.json``."""
    return [Measurement(**{**item, "ci95": tuple(item["ci95"])}) for item in content["measurements"]]


def _as_json(item: Measurement) -> dict[str, Any]:
    content = asdict(item)
    if content["difference"] is None:
        del content["difference"]
    return content


def _figure(value: float, *, signed: bool = False) -> str:
    digits = 3 if abs(value) < 100 else 1
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("+0.000", "0.000").replace("-0.000", "0.000")


def _place(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
