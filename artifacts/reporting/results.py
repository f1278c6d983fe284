"""``eval.json`` and the one table that terminal, card and report all show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from ...editing.errors import counted
from ...eval.concept import Concept
from ...eval.intervals import Z, holm
from ...eval.measurements import BY_LAYER, MEASUREMENTS, SPLITS, OnSplit, label_of, place_of
from ...eval.ratios import FEWEST_SUBJECTS
from ...eval.statistics import Measurement, Scores, summarize
from ..checkpoints.manifest import FOLDER
from ..upgrade import SCHEMA_VERSION
from .sections import Story, measurement_from

if TYPE_CHECKING:
    # The name of a type alone: at run time it would bring torch, which showing results does not need.
    from ...eval.inference.generation import Reply

RESULTS = f"{FOLDER}/eval.json"
INTERVALS = (
    "Brackets are 95% intervals, in which items on one subject count as belonging together: Wilson for shares, Tango"
    " for differences of shares on the same items, Student's t and the bootstrap-t for the rest; […, …] where fewer than"
    f" {FEWEST_SUBJECTS} subjects, or items that are all alike, allow no interval. A difference is named as a finding, or coloured, if it is told from 0 when"
    " all rows are tested together (5%, Holm's correction)."
)
SubjectName = Literal["base", "edited", "reference"]


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
    moved: bool = False
    """Whether the difference from the base is told from 0 when all rows of the table are tested together."""

    @property
    def on(self) -> OnSplit:
        """What the table of measurements says of this split."""
        about = MEASUREMENTS.get(self.name)
        return about.splits.get(self.split, OnSplit()) if about else OnSplit()

    @property
    def base_text(self) -> str:
        """The base's value with its interval, or what stands in its place."""
        if self.base is None and self.name in MEASUREMENTS:
            return MEASUREMENTS[self.name].base_is
        return format_value(self.base)


def summarize_all(scores: Mapping[SubjectName, Sequence[Scores]]) -> list[Measurement]:
    """Every value with its interval; edited and reference with their paired difference from the base.

    What could not be scored at all has no value; ``not_measured`` tells of it.
    """
    base = {(item.name, item.split): item for item in scores.get("base", ())}
    return [
        summarize(item, subject, None if subject == "base" else base.get((item.name, item.split)))
        for subject, items in scores.items()
        for item in items
        if not item.is_empty
    ]


def not_measured(scores: Mapping[SubjectName, Sequence[Scores]]) -> list[str]:
    """A sentence for everything of which no item could be scored, such as the perplexity of replies that are empty."""
    return [
        f"Not measured on the {subject} model: {label_of(item.name)} ({item.split}); "
        + (
            f"none of its {counted(item.skipped, 'item', 'items')} could be scored."
            if item.skipped
            else "the pack holds nothing for it."
        )
        for subject, items in scores.items()
        for item in items
        if item.is_empty
    ]


def not_held(concept: Concept) -> list[str]:
    """A sentence for every part of a pack without which whole measurements are left out."""
    if concept.about.kind == "task":
        return []
    sentences = []
    if not concept.questions:
        sentences.append(
            "The pack has no questions, so what the model knows was not measured; questions.jsonl or open_questions.jsonl"
            " would hold some."
        )
    if not any(prompt.split == "concept" for prompt in concept.prompts):
        sentences.append(
            "The pack has no prompts on the concept, so replies on it were not measured; prompts.jsonl would hold some."
        )
    return sentences


def decoding(set_aside: Mapping[str, Any], *, of: str = "The model's", remedy: str = "") -> str:
    """A sentence on what replies were measured without; empty if there was nothing to set aside."""
    if not set_aside:
        return ""
    asked = ", ".join(f"{key}={value}" for key, value in set_aside.items())
    return (
        f"{of} generation_config also asks for {asked}. Replies were measured without it: greedily, as the weights"
        f" alone decide.{remedy}"
    )


def about_prompts(
    replies: Mapping[str, Mapping[str, Sequence[Reply]]], *, template: bool, kind: str, tokens: int
) -> list[str]:
    """Sentences on what the prompts and replies of a measurement were not.

    Args:
        replies: By model and split.
        template: Whether the model has a chat template.
        kind: What the concept is.
        tokens: Longest reply.
    """
    sentences = []
    if not template and kind == "behaviour":
        sentences.append(
            "The model has no chat template: prompts were put to it as plain text, so its replies are continuations, and"
            " the rate of a behaviour may mean little."
        )
    for name, by_split in replies.items():
        every = [reply for split in by_split.values() for reply in split]
        if cut := sum(not reply.answered for reply in every):
            sentences.append(
                f"{cut} of {len(every)} replies of {name} were still thinking after {tokens} tokens and have no answer:"
                " rates count answers alone. Raise max_new_tokens, or leave out thinking=true, or give a"
                " response_prefix that closes the thoughts."
            )
    return sentences


FEW = 10
"""A figure is said to be decided by few of its subjects if fewer than one in so many hold half of it."""


def dominated(scores: Mapping[SubjectName, Sequence[Scores]]) -> list[str]:
    """What is a lower bound, what few subjects decide, so that its interval is too narrow whatever the method, and of what
    they are too few for an interval: a sentence for each kind."""
    items = [item for of_model in scores.values() for item in of_model if not item.is_empty]
    bounds = [_bounded(item) for item in items if item.as_one]
    few: dict[str, dict[str, tuple[int, ...]]] = {}
    for item in items:
        if not item.as_one and (found := _few(item)):
            sentence, counts = found
            rows = few.setdefault(sentence, {})
            # Of several models the one that fewest decide.
            rows[_named(item)] = min(counts, rows.get(_named(item), counts))
    told = [
        f"{sentence}: " + "; ".join(f"{name}, {' of '.join(map(str, counts))}" for name, counts in rows.items()) + "."
        for sentence, rows in few.items()
    ]
    return [*dict.fromkeys(bounds), *told]


def _named(item: Scores) -> str:
    return f"{label_of(item.name)} ({item.split})"


def _bounded(item: Scores) -> str:
    return (
        f"{_named(item)} is a lower bound: the vocabulary is too large for the memory, so the unlikeliest tokens count as one,"
        f" to which the base gives a probability of {item.as_one:.1g} on average."
    )


def _few(item: Scores) -> tuple[str, tuple[int, ...]] | None:
    """How a sentence begins about everything with too few subjects in the same way, and how many there are."""
    kind = "items" if item.subjects == len(item.ids) else "subjects"
    if item.has_too_few:
        return f"Too few {kind} for an interval, which needs at least {FEWEST_SUBJECTS}", (item.subjects,)
    if item.subjects > 2 and item.holding_half <= max(1, item.subjects // FEW):
        said = f"Few {kind} hold half of what is counted, so that the interval may be too narrow"
        return said, (item.holding_half, item.subjects)
    return None


def table(measurements: Sequence[Measurement]) -> list[Row]:
    """Measurements side by side, in the order in which they matter."""
    by_row: dict[tuple[str, str], dict[str, Measurement]] = {}
    for item in measurements:
        if item.name != BY_LAYER:
            by_row.setdefault((item.name, item.split), {})[item.subject] = item
    moved = holm({key: p for key, row in by_row.items() if (p := _of_no_difference(row.get("edited"))) is not None})
    keys = sorted(by_row, key=lambda key: place_of(*key))
    return [_row(name, split, by_row[name, split], (name, split) in moved) for name, split in keys]


def _of_no_difference(item: Measurement | None) -> float | None:
    """p of the hypothesis that there is no difference from the base; None where there is nothing to test."""
    if item is None or item.difference is None:
        return None
    value, interval = item.difference["value"], item.difference["ci95"]
    # An interval that holds 0 refuses nothing, whatever another test would say.
    if interval is None or interval[0] <= 0 <= interval[1]:
        return 1.0
    if "p" in item.difference:
        return float(item.difference["p"])
    # Files of earlier versions have the interval alone, whose nearer end tells the standard error.
    return 2 * NormalDist().cdf(-Z * abs(value) / max(1e-12, abs(value - interval[0 if value > 0 else 1])))


def _row(name: str, split: str, subjects: dict[str, Measurement], moved: bool) -> Row:
    some = next(iter(subjects.values()))
    return Row(
        name,
        split,
        label_of(name),
        some.unit,
        some.better,
        some.n,
        max(item.skipped for item in subjects.values()),
        subjects.get("base"),
        subjects.get("edited"),
        subjects.get("reference"),
        moved,
    )


def split_meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the splits of a table hold, each explained once."""
    names = {row.split for row in rows}
    return [(name, about) for name, about in SPLITS.items() if name in names]


def measured_on(concept: Mapping[str, Any]) -> str:
    """What the figures of specificity are of, in a sentence; empty for earlier files, which measured all."""
    counts = concept.get("measured_on", {})
    counts = {kind: one for kind, one in counts.items() if one["of"]}
    apart = [f"{one['n']} of {one['of']} {kind}" for kind, one in counts.items() if one["n"] < one["of"]]
    whole = [f"all {one['of']} {kind}" for kind, one in counts.items() if one["n"] == one["of"]]
    sentences = [f"What should stay is measured on what no training sees: {', '.join(apart)}." if apart else ""]
    if whole:
        sentences.append(f"The pack is too small to hold any out of these, which training may see: {', '.join(whole)}.")
    return " ".join(filter(None, sentences))


def layers_probed(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Probe accuracy at each layer, by subject."""
    by_layer: dict[str, dict[str, Any]] = {}
    for item in measurements:
        if item.name == BY_LAYER:
            by_layer.setdefault(item.split, {"layer": int(item.split)})[item.subject] = item
    return [by_layer[split] for split in sorted(by_layer)]


def format_value(item: Measurement | None) -> str:
    """A value with its interval."""
    if item is None:
        return ""
    return f"{figure(item.value)} {_interval(item.ci95)}"


def format_difference(item: Measurement | None) -> str:
    """A difference from the base with its interval."""
    if item is None or item.difference is None:
        return ""
    return f"{figure(item.difference['value'], signed=True)} {_interval(item.difference['ci95'], signed=True)}"


def _interval(ci95: Sequence[float] | None, *, signed: bool = False) -> str:
    """Both ends; dots where the items tell of none."""
    low, high = ("…", "…") if ci95 is None else (figure(end, signed=signed) for end in ci95)
    return f"[{low}, {high}]"


def samples(base: dict[str, list[Reply]], edited: dict[str, list[Reply]], count: int) -> list[dict[str, str]]:
    """Prompts with both models' replies, the first ``count`` of each split."""
    return [
        {"split": split, "prompt": before.prompt, "base": before.shown, "edited": after.shown}
        for split in base
        for before, after in list(zip(base[split], edited[split], strict=True))[:count]
    ]


def write_results(
    folder: Path,
    content: dict[str, Any],
    measurements: Sequence[Measurement],
    tell: Callable[[dict[str, Any]], Story] = lambda _: Story(),
) -> dict[str, Any]:
    """Write ``excise/eval.json`` into a folder and return what was written.

    Args:
        tell: What the recipe says of its run, from everything else that the file holds.
    """
    whole = {"schema_version": SCHEMA_VERSION, **content, "measurements": measurements_as_json(measurements)}
    # The recipe tells its story from everything else in the file, so it comes last.
    whole["story"] = tell(whole).as_json()
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def measurements_as_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements as plain data."""
    return [_as_json(item) for item in measurements]


def read_measurements(content: dict[str, Any]) -> list[Measurement]:
    """The measurements of an ``eval.json``."""
    return [measurement_from(item) for item in content["measurements"]]


def _as_json(item: Measurement) -> dict[str, Any]:
    content = asdict(item)
    if content["difference"] is None:
        del content["difference"]
    return content


def figure(value: float, *, signed: bool = False) -> str:
    """A number with three digits behind the point, one where it is large."""
    digits = 3 if abs(value) < 100 else 1
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    # A rounded 0 has no sign.
    return text.replace("+0.000", "0.000").replace("-0.000", "0.000")
