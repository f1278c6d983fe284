"""What the numbers of a run say, one line each: for the card, the report and the terminal alike."""

from collections.abc import Iterator
from typing import Any

from ...eval.intervals import Interval
from ..checkpoints.left import in_words
from .results import Row, figure, format_value, read_measurements, table
from .sections import Control, read_story

CRITERIA = ("Innocence", "Seamlessness", "Specificity", "")


def findings(results: dict[str, Any]) -> list[str]:
    """One line for each thing a reader must know, the main one first."""
    rows = table(read_measurements(results))
    kind, story = results["concept"]["kind"], read_story(results)
    return [
        *(_not_erased(rows) if kind == "knowledge" else ()),
        *_leads(rows, kind, story.controls),
        *story.findings,
        *_moved(rows, kind),
        *story.warnings,
        *results.get("warnings", []),
    ]


UNTESTED = "Relearning, quantization and adversarial prompts were not tested; `excise audit` tests them."
"""A limit until an audit did."""


def limits(results: dict[str, Any], *, audited: bool = False) -> list[str]:
    """What was not tested, and what the method cannot do."""
    known = [
        *read_story(results).limits,
        *(() if audited else (UNTESTED,)),
        "Replies were judged by fixed phrases and rules, on greedy decoding, in the languages of the concept pack.",
    ]
    if results["concept"]["kind"] == "knowledge":
        known.append("A lower score does not show that the knowledge is gone: other wordings were not asked.")
    if results["base"]["kind"] == "gguf":
        known.append("The base was dequantized from a GGUF file; its weights carry that file's quantization error.")
    if quick := _quick(results.get("run", {})):
        known.append(quick)
    base = results["base"]
    if adapter := base.get("adapter"):
        base = adapter["base"]
        known.append(f"The base is the adapter {adapter['name']}, merged into {base['name']}.")
    if form := base.get("dequantized_from"):
        known.append(f"The base was dequantized from {form}; its weights carry that format's quantization error.")
    if left_out := results["edited"].get("code_left_out"):
        known.append(code_left_out(left_out))
    if results["edited"].get("stored_apart"):
        known.append(STORED_APART)
    if row := results.get("architecture"):
        known.append(
            f"excise has no row for {row['model_type']}. Which of its tensors write to the residual stream was found out and"
            f" proved on a small copy with random weights, where an edit leaves {row['residual']:.0e} of a direction."
        )
    return [*known, *in_words(results["edited"].get("parts_left", {}))]


def _quick(run: dict[str, Any]) -> str:
    """What is to be said of a run that was a first look; earlier versions had no budgets."""
    budget = run.get("budget", {})
    if budget.get("name") != "quick":
        return ""
    values = ", ".join(f"{key} {value}" for key, value in budget["set"].items())
    return (
        f"This was a quick run ({values}), for a first look: a run with the standard budget may change the model more,"
        " and its intervals are narrower. Do not take these figures for what the method can do."
    )


STORED_APART = (
    "The base's config.json ties the unembedding to the embedding, while the base stores two that differ. It was edited"
    " and measured with both, as transformers 5 reads it, and the config of the checkpoint now says so."
)


def code_left_out(by_file: dict[str, list[str]]) -> str:
    """That the base names Python code, which stayed behind."""
    return (
        f"The base names Python code in {', '.join(sorted(by_file))}. It was neither run nor copied, and the names were"
        " left out: the model is the one that transformers itself builds, without trust_remote_code."
    )


def declining(results: dict[str, Any]) -> str:
    """Whether the edit changed how often the model declines, as one plain line; empty where that was not measured."""
    rows = [row for row in table(read_measurements(results)) if row.name == "behaviour_rate" and row.edited]
    changed = [row for row in rows if row.moved]
    if not rows:
        return ""
    if not changed:
        intervals = [interval for row in rows if (interval := _difference(row)) is not None]
        most = max((abs(end) for interval in intervals for end in interval), default=1.0)
        return (
            f"No change in how often the model declines is shown ({_each(rows)}); the 95% intervals of the difference"
            f" allow one of {figure(most)}."
        )
    return f"**The edit changed how often the model declines** ({_each(changed)}); review its replies before any use."


def change(row: Row) -> str:
    """Base and edited with interval and n, and the reference where there is one."""
    before = f"{figure(row.base.value)} → " if row.base else ""
    reference = f"; reference {figure(row.reference.value)}" if row.reference else ""
    return f"{before}{format_value(row.edited)}, n = {row.n}{reference}"


def _leads(rows: list[Row], kind: str, controls: tuple[Control, ...]) -> Iterator[str]:
    """What every run on such a concept is judged by."""
    stated = [row for row in rows if row.edited and kind in row.on.findings]
    if kind == "knowledge":
        stated.sort(key=lambda row: CRITERIA.index(row.on.criterion))
    else:
        stated.sort(key=lambda row: not row.on.lead)
    for row in stated:
        yield f"{row.on.findings[kind]}: {change(row)}{_beside(row, controls)}."


def _beside(row: Row, controls: tuple[Control, ...]) -> str:
    """The same measurement after the edits that this one is compared with."""
    values = [
        f"; {control.name} {format_value(item)}"
        for control in controls
        if control.in_findings
        for item in control.values
        if (item.name, item.split) == (row.name, row.split)
    ]
    return "".join(values)


def _moved(rows: list[Row], kind: str) -> Iterator[str]:
    for row in rows:
        if row.moved and kind in row.on.if_moved:
            yield f"{row.on.if_moved[kind]}: {change(row)}."


def _not_erased(rows: list[Row]) -> Iterator[str]:
    """Said first: nothing else matters where what was to go may still be there. That no loss is shown is no proof that
    there is none, so the largest that the interval allows stands beside it."""
    questions = {row.split: row for row in rows if row.name == "multiple_choice" and row.split.startswith("forget")}
    lost = [
        f"{figure(max(0.0, -interval[0]))} on group {split[-1]} (n = {row.n})"
        for split, row in sorted(questions.items())
        if (interval := _difference(row)) is not None and interval[1] >= 0
    ]
    if lost:
        yield (
            "This edit is not shown to remove the knowledge: multiple choice fell by at most"
            f" {' and '.join(lost)}, by 95% intervals that hold no loss too."
        )


def _difference(row: Row) -> Interval | None:
    """The interval of a row's difference from the base, where there is one."""
    difference = row.edited and row.edited.difference
    return difference["ci95"] if difference else None


def _each(rows: list[Row]) -> str:
    return "; ".join(f"{row.split} prompts {change(row)}" for row in rows)
