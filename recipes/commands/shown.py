"""Results as text for the terminal; ``artifacts.reporting.terminal`` lays out the tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.reporting.audit_page import best, estimate, headline_of, working
from ...artifacts.reporting.findings import findings
from ...artifacts.reporting.results import Row, format_difference, format_value, read_measurements, table
from ...artifacts.reporting.terminal import aligned, bullets
from ...editing.errors import counted
from ...eval.measurements import BY_LAYER, label_of

if TYPE_CHECKING:
    # Only names of types: at run time these recipes would bring transformers' trainer, and seconds of waiting.
    from ...artifacts.pull import Pulled
    from ...artifacts.reporting.outcomes import Evaluation
    from ...eval.anatomy import Spectrum
    from ..compare import Line
    from ..diff import Difference
    from ..inspect import Looked
    from ..localize import Localized
    from ..meta import MetaEvaluation
    from ..reproduce import Reproduced

SHOWN_ROWS = 12
"""Rows of a run's table that are shown unless all are wanted."""
COLUMN_NAMES = {"base": "base", "edited": "edited", "reference": "reference", "difference": "edited - base"}
NARROW = 70
"""Below so many columns, replies stand one under the other."""
CONTEXTS = 2
"""Contexts shown of each end of a direction."""


def run_end(results: dict[str, Any], width: int | None, *, all_rows: bool = False) -> str:
    """A run's findings and its table, the first rows of it unless all are wanted."""
    rows = table(read_measurements(results))
    # What an edit is judged by goes before what is measured beside it; the table's order stays.
    by_weight = sorted(range(len(rows)), key=lambda n: not (rows[n].on.criterion or rows[n].on.findings))
    shown = rows if all_rows else [rows[n] for n in sorted(by_weight[:SHOWN_ROWS])]
    parts = [bullets(findings(results), width), "", measurement_table(shown, width)]
    if len(rows) > len(shown):
        parts.append(
            f"and {counted(len(rows) - len(shown), 'more row', 'more rows')}: see the report or the card, or run with --all"
        )
    return "\n".join(parts)


def measurement_table(rows: Sequence[Row], width: int | None) -> str:
    """Measurements of one model, beside its base and the reference where there are any."""
    has_base, has_reference = any(row.base for row in rows), any(row.reference for row in rows)
    columns = ["base", "edited", *(["reference"] if has_reference else []), "difference"] if has_base else ["edited"]
    names = [COLUMN_NAMES[column] for column in columns] if has_base else ["value"]
    return aligned(
        ["measurement", "split", "n", *names],
        [[row.label, row.split, _count(row), *(_cell(row, column) for column in columns)] for row in rows],
        width,
    )


def _cell(row: Row, column: str) -> str:
    if column == "difference":
        return format_difference(row.edited)
    if column == "base" and row.base is None and row.base_text:
        value, _, why = row.base_text.partition(" ")
        # In brackets, which a narrow window leaves out like an interval.
        return f"{value} [{why}]"
    return format_value(getattr(row, column))


def _count(row: Row) -> str:
    return f"{row.n} ({row.skipped} skipped)" if row.skipped else str(row.n)


def evaluation_table(evaluation: Evaluation, width: int | None) -> str:
    """Measurements of several models on the same items, one column a model, and what could not be measured."""
    rows = evaluation.table
    has_base = any(row.base for row in rows)
    shown = aligned(
        ["measurement", "split", "n", *(["base"] if has_base else []), *evaluation.names],
        [
            [
                row.label,
                row.split,
                str(row.n),
                *([format_value(row.base)] if has_base else []),
                *(format_value(value) for value in row.models.values()),
            ]
            for row in rows
        ],
        width,
    )
    missing = [
        line.replace("edited model", name)
        for name, result in zip(evaluation.names, evaluation.results, strict=True)
        for line in result["warnings"]
    ]
    return "\n".join([shown, *dict.fromkeys(missing)])


def audit_end(results: dict[str, Any], width: int | None) -> str:
    """An audit's verdict, the reasons for it, and what each attack reached on each model."""
    subjects = ("base", "edited", "reference")
    rows = [["none", *(f"{results['untouched'][name]:.3f}" for name in subjects), "", "", ""]]
    for attack in results["attacks"]:
        values = [best(attack, name) for name in subjects]
        beside = [working(attack), estimate(attack["regained"]), estimate(attack["rtt_leak"])]
        rows.append([attack["name"], *values, *beside])
    header = ["attack", *subjects, "else", "share regained", "leak"]
    parts = [
        bullets([f"{headline_of(results)}."], width, mark=""),
        bullets([*results["reasons"], *results.get("findings", [])], width),
        "",
        aligned(header, rows, width),
    ]
    if results.get("notes"):
        parts.append(bullets([f"asked and read: {note}" for note in results["notes"]], width))
    if results["gaps"]:
        parts.append(bullets([f"not tested: {gap}" for gap in results["gaps"]], width))
    if results["reused"]:
        reused = f"curves of {', '.join(results['reused'])} come from an earlier audit; --fresh computes them again"
        parts.append(bullets([reused], width))
    return "\n".join(parts)


def meta_evaluation(found: MetaEvaluation, width: int | None) -> str:
    """Which measurements tell models apart, the best first."""
    has_edited = bool(found.edited)
    header = [
        "measurement",
        "split",
        "knows",
        "never",
        "AUC",
        *(["4 bits", "relearned", "overall"] if has_edited else []),
    ]
    rows = []
    telling = [one for one in found.measurements if one.higher != "either" and one.name != BY_LAYER]
    for one in telling:
        known = [f"{one.knowing:.3f}", f"{one.unknowing:.3f}", f"{one.auc:.2f} [{one.ci95[0]:.2f}, {one.ci95[1]:.2f}]"]
        steady = [("" if value is None else f"{value:.2f}") for value in (one.four_bits, one.relearning, one.overall)]
        rows.append([label_of(one.name), one.split, *known, *(steady if has_edited else [])])
    said = [
        f"{counted(len(found.knowing), 'model', 'models')} with the knowledge, {len(found.unknowing)} without it,"
        f" {len(found.edited)} edited. AUC: how often a model of each kind is the right way round; 0.5 is chance.",
        f"Not shown: {counted(len(found.measurements) - len(telling), 'row', 'rows')} of what should be the same in both"
        " kinds, and of probes at each layer; --json and meta.json have them.",
    ]
    if has_edited:
        said.append(
            "4 bits: how little rounding moves the edited models. relearned: how alike they and a model that never knew"
            f" move after {found.steps} steps on group T. Both and overall: 0 to 1, 1 is best."
        )
    if found.left_out:
        said.append(f"Left out, because some model gave no value: {', '.join(found.left_out)}.")
    return "\n".join([aligned(header, rows, width), "", bullets(said, width)])


def localization(found: Localized, width: int | None) -> str:
    """Where facts are computed: sentences, then effects layer by layer, exact ones where there are any."""
    from ..localize import grids, sentences

    shares, columns = grids(found)
    parts = list(dict.fromkeys(column.rsplit(" ", 1)[0] for column in columns))
    rows = [
        [str(layer), *(" ".join(map(_share, row[place : place + 3])) for place in range(0, len(columns), 3))]
        for layer, row in enumerate(shares.get("restored") or shares["estimated"])
    ]
    return "\n".join(
        [bullets(sentences(found), width), "", aligned(["layer", *(f"{part} s b l" for part in parts)], rows, width)]
    )


def _share(value: float | None) -> str:
    return "    –" if value is None else f"{round(value, 2) + 0.0:5.2f}"


def difference(comparison: Difference, most: int, width: int | None) -> str:
    """Which tensors differ, the most changed first."""
    parts = [
        f"{counted(len(comparison.changed), 'tensor differs', 'tensors differ')}, {comparison.same} equal bit for bit"
    ]
    for names, where in ((comparison.only_in_a, comparison.a), (comparison.only_in_b, comparison.b)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"only in {where}: {', '.join(names[:5])}{more}")
    if said := comparison.anatomy.sentences():
        parts.append(bullets(said, width))
    rows = [
        [
            item.name,
            "×".join(map(str, item.shape)),
            "was zero" if item.relative_norm is None else f"{item.relative_norm:.4f}",
            f"{item.largest:.3g}",
            *_spectrum(item.spectrum),
            " ".join(f"{value:.3g}" for value in item.singular_values),
        ]
        for item in comparison.changed[:most]
    ]
    if rows:
        header = ["tensor", "shape", "|B-A| / |A|", "largest", "99% rank", "cliff", "singular values"]
        parts.append(aligned(header, rows, width))
    if len(comparison.changed) > most:
        parts.append(f"and {len(comparison.changed) - most} more; --most N shows more of them")
    return "\n".join(parts)


def _spectrum(found: Spectrum | None) -> tuple[str, str]:
    """Directions that hold 99% of a change, and where its singular values fall, by what factor."""
    if found is None:
        return "", ""
    cliff = f"×{found.cliff:.0f} at {found.cliff_rank}" if found.shallow and found.cliff else "none"
    return str(found.rank_99), cliff


def reproduction(done: Reproduced, width: int | None) -> str:
    """Whether the same came out."""
    parts = [f"not as it was: {difference}" for difference in done.differences]
    if done.identical:
        return "\n".join([*parts, f"the new weights are identical, bit for bit; {done.out}"])
    inside = done.compared - len(done.outside)
    parts.append(f"the new weights differ: {', '.join(done.changed_files)}")
    parts.append(f"{inside} of {done.compared} measurements lie within their published intervals; {done.out}")
    if done.outside:
        parts.append(bullets([f"outside: {line}" for line in done.outside], width))
    if not done.differences:
        parts.append(
            "packages and platform are the published ones, so the weights should be identical; please report it"
        )
    return "\n".join(parts)


def comparison(lines: Sequence[Line], width: int | None) -> str:
    """One column a model: there are more measurements than models."""
    names = list(dict.fromkeys(name for line in lines for name in line.values))
    rows = [[name, *(format_value(line.values.get(name)) for line in lines)] for name in names]
    rows.append(["seconds to learn", *("" if line.seconds is None else f"{line.seconds:.0f}" for line in lines)])
    return aligned(["measurement", *(f"{line.name} ({line.recipe})" for line in lines)], rows, width)


def inspection(looked: Looked, width: int | None) -> str:
    """Each direction: its tokens and contexts at both ends, and what ablating it alone costs."""
    skipped = f"; {looked.left_out} more left out" if looked.left_out else ""
    parts = [f"{counted(looked.texts, 'text was', 'texts were')} read{skipped}"]
    for item in looked.directions:
        about = (
            f"{item.index}  {item.name} at the {item.place}: score {item.score:.4g}, projection {item.mean:.3f} ± "
            f"{item.deviation:.3f}, loss when ablated {item.effect:+.4f} nats per token"
        )
        parts.append(bullets([about], width, mark=""))
        for sign, ends, contexts in (("+", item.top_tokens, item.top), ("-", item.bottom_tokens, item.bottom)):
            parts.append(_cut(f"   {sign} tokens {' '.join(repr(token)[1:-1] for token in ends)}", width))
            for context in contexts[:CONTEXTS]:
                text = " ".join(f"{context.before}[{context.token}]{context.after}".split())
                parts.append(_cut(f"   {sign} {context.projection:+.2f}  {text}", width))
    return "\n".join(parts)


def side_by_side(replies: dict[str, str], width: int | None) -> str:
    """Replies in columns, or one under the other where there is little room."""
    texts = {name: " ".join(text.split()) or "(empty)" for name, text in replies.items()}
    if width is None or width < NARROW or len(texts) == 1:
        longest = max(map(len, texts))
        return "\n".join(bullets([text], width, mark=f"{name:<{longest}}  ") for name, text in texts.items())
    room = (width - 3) // 2
    columns = [[name, *textwrap.wrap(text, room)] for name, text in texts.items()]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(f"{left:<{room}} | {right}".rstrip() for left, right in rows)


def pulled(done: Pulled, out: Path) -> list[str]:
    """What a download came to."""
    if done.made_by_excise:
        return [f"{out}: {counted(done.files, 'file', 'files')}, all as published, at commit {done.commit}"]
    parts = [
        f"{out}: {counted(done.files, 'file', 'files')}, as the Hub lists them, at commit {done.commit}",
        "excise did not make this model: it has no checksums and no measurements by excise",
    ]
    if done.left_out:
        parts.append(f"not fetched: {counted(done.left_out, 'file', 'files')}, neither safetensors nor configuration")
    return parts


def _cut(line: str, width: int | None) -> str:
    most = width or 120
    return line if len(line) <= most else line[: most - 1] + "…"
