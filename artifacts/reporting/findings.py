"""What the numbers of a run say, as sentences: for the card, the report and the terminal alike."""

from collections.abc import Iterator
from typing import Any

from ...eval.statistics import Measurement
from .results import Row, format_value, read_measurements, table


def findings(results: dict[str, Any]) -> list[str]:
    """One sentence for each thing a reader must know, the main one first."""
    rows = {(row.name, row.split): row for row in table(read_measurements(results))}
    kind, name = results["concept"]["kind"], results["concept"]["name"]
    if kind == "task":
        sentences = list(_task(rows, results.get("caft")))
    else:
        sentences = list(_behaviour(rows) if kind == "behaviour" else _knowledge(rows, name))
    if "target_check" in results:
        sentences += _below_chance(rows, results["target_check"]["chance"])
    sentences += _side_effects(rows, kind)
    if "direction" in results and not results["direction"]["passed_filters"]:
        sentences.append(
            "No candidate direction passed the selection filters; the one that moves neutral text least was used. "
            "Expect little effect, or damage."
        )
    sentences += results.get("warnings", [])
    if results["edited"]["tied"] and results["edited"].get("embeddings") == "edit":
        sentences.append("The embedding is also the unembedding of this model, so both were edited.")
    return sentences


UNTESTED = "; relearning, quantization and adversarial prompts were not tested"
"""Until an audit did."""


def limits(results: dict[str, Any], *, audited: bool = False) -> list[str]:
    """What was not tested, and what the method cannot do."""
    what = (
        "One direction was removed from what the weights write. Whatever the model encodes in other directions, or can "
        "relearn by fine-tuning, is still there"
        if "direction" in results
        else "The update was trained on the pack's contexts. Other ways to ask may still bring the knowledge out, and "
        "fine-tuning may bring it back"
    )
    if "pruning" in results:
        what = "Units were silenced by a score on the pack's contexts; what other units encode is still there"
    if "caft" in results:
        what = (
            "Directions were taken out of the stream while training, and only then; the fine-tuned model may have learned the same by "
            "another way that these items do not show, and further training may bring it in"
        )
    known = [
        f"{what}{'' if audited else UNTESTED}.",
        "Replies were judged by fixed phrases and rules, on greedy decoding, in the languages of the concept pack.",
    ]
    if results["concept"]["kind"] == "knowledge":
        known.append(
            "A lower score on questions does not show that the knowledge is gone: other wordings were not asked."
        )
    if results["base"]["kind"] == "gguf":
        known.append("The base was dequantized from a GGUF file; its weights carry that file's quantization error.")
    return known


def _behaviour(rows: dict[tuple[str, str], Row]) -> Iterator[str]:
    rate, right = rows.get(("behaviour_rate", "concept")), rows.get(("exact_answer", "concept"))
    if rate:
        yield f"On prompts that show the behaviour the model declined {_change(rate)}."
    if right:
        yield f"The answers it now gives there are right: {_change(right)}."
    induced = rows.get(("induced_rate", "neutral"))
    if induced and induced.base:
        yield f"Added to the base, the direction makes {format_value(induced.base)} of neutral replies show the behaviour."


def _task(rows: dict[tuple[str, str], Row], caft: dict[str, Any] | None) -> Iterator[str]:
    """What fine-tuning taught, beside what it would have taught without ablation."""
    said = {
        ("multiple_choice", "intended"): "Right where all cues agree, as in training",
        ("multiple_choice", "flipped"): "Right where the unintended cue misleads",
        ("learned_rate", "concept"): "Replies that show what was trained, on prompts like those trained on",
        ("learned_rate", "neutral"): "The same on other prompts",
    }
    for key, words in said.items():
        if row := rows.get(key):
            yield f"{words}: {_change(row)}{_beside(key, caft)}."
    if right := rows.get(("exact_answer", "neutral")):
        yield f"Right answers on other things: {_change(right)}."


def _beside(key: tuple[str, str], caft: dict[str, Any] | None) -> str:
    names = {
        "none": "without ablation",
        "random": "with as many random directions",
        "top_k": "with as many of the highest score",
    }
    found = [
        f"{names[name]} {format_value(Measurement(**{**item, 'ci95': tuple(item['ci95'])}))}"
        for name, items in (caft or {}).get("controls", {}).items() for item in items
        if (item["name"], item["split"]) == key
    ]  # fmt: skip
    return f"; {', '.join(found)}" if found else ""


CRITERIA: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Innocence": (
        ("multiple choice on {name}, group T", "multiple_choice", "forget_T"),
        ("group V", "multiple_choice", "forget_V"),
        ("greedy answers that are right", "exact_answer", "concept"),
        ("a linear probe", "probe", "forget_V"),
    ),
    "Seamlessness": (
        ("perplexity of replies on {name} under the base", "reverse_perplexity", "concept"),
        ("distinct word pairs", "distinct_2", "concept"),
        ("repetition", "repetition", "concept"),
        ("on topic", "on_topic", "concept"),
    ),
    "Specificity": (
        ("multiple choice on neighbours", "multiple_choice", "neighbour"),
        ("on the rest", "multiple_choice", "retain"),
        ("perplexity on retain texts", "perplexity", "retain"),
        ("KL from base on retain texts", "kl_from_base", "retain"),
    ),
}
"""What each of the three criteria of concept erasure is read from (ELM, section 3)."""


def _knowledge(rows: dict[tuple[str, str], Row], name: str) -> Iterator[str]:
    for criterion, parts in CRITERIA.items():
        shown = [
            f"{label.format(name=name)} {_brief(row)}"
            for label, measurement, split in parts
            if (row := rows.get((measurement, split))) and row.edited
        ]
        if shown:
            yield f"{criterion}: {'; '.join(shown)}."
    kept = [s for s in ("forget_T", "forget_V") if (row := rows.get(("multiple_choice", s))) and not _fell(row.edited)]
    if kept:
        yield (
            f"No measurable loss on multiple choice ({', '.join(split[-1] for split in kept)}): this edit does not "
            "remove the knowledge."
        )


def _below_chance(rows: dict[tuple[str, str], Row], chance: float) -> Iterator[str]:
    """Say so where the truth is avoided: whoever looks for what a model avoids finds it."""
    for split in ("forget_T", "forget_V"):
        row = rows.get(("multiple_choice", split))
        if row is None or row.edited is None or row.edited.ci95[1] >= chance:
            continue
        if row.reference is None or row.edited.value < row.reference.ci95[0]:
            yield (
                f"Group {split[-1]} is answered below chance ({format_value(row.edited)}, chance {chance:.3f}): the true answer "
                "is avoided rather than unknown, which gives it away to whoever looks for it; one_sided=true ends at chance."
            )


def _fell(item: Measurement | None) -> bool:
    return item is None or item.difference is None or bool(item.difference["ci95"][1] < 0)


def _side_effects(rows: dict[tuple[str, str], Row], kind: str) -> Iterator[str]:
    if kind == "behaviour" and (row := rows.get(("multiple_choice", "retain"))):
        yield f"Multiple choice on what should stay (retain): {_change(row)}."
    for split in ("concept", "neutral"):
        row = rows.get(("behaviour_rate", split))
        if row and _moved(row.edited) and not (kind == "behaviour" and split == "concept"):
            yield f"The edit changed how often the model declines ({split} prompts): {_change(row)}."
    for split in ("concept", "neutral"):
        row = rows.get(("degenerate_share", split))
        if row and _moved(row.edited):
            yield f"The edit changed the share of empty or repeating replies ({split} prompts): {_change(row)}."
    perplexity = rows.get(("perplexity", "retain"))
    if kind == "behaviour" and perplexity and _moved(perplexity.edited):
        yield f"The edit changed the perplexity on retain texts: {_change(perplexity)}."
    kl = rows.get(("kl_from_base", "neutral"))
    if kl and kl.edited:
        yield f"On neutral prompts the model moved {format_value(kl.edited)} nats a token from its base."


def _change(row: Row) -> str:
    before = f"{format_value(row.base)} before, " if row.base else ""
    return f"{before}{format_value(row.edited)} after (n = {row.n})"


def _brief(row: Row) -> str:
    before = f"{format_value(row.base)} → " if row.base else ""
    reference = f"never {format_value(row.reference)}, " if row.reference else ""
    return f"{before}{format_value(row.edited)} ({reference}n = {row.n})"


def _moved(item: Measurement | None) -> bool:
    if item is None or item.difference is None:
        return False
    low, high = item.difference["ci95"]
    return bool(low > 0 or high < 0)
