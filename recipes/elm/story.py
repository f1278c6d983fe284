"""What ELM says of its runs: how it was trained, what the target promised, and answers that fell below chance."""

from typing import Any

from ...artifacts.reporting.results import format_value, read_measurements
from ...artifacts.reporting.sections import Section, Story, Table, lines
from ..common.story import LOW_RANK_LIMIT, UNLEARNING_TAGS, low_rank_headline, training_section


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    return Story(
        low_rank_headline(results),
        warnings=tuple(below_chance(results)),
        limits=(LOW_RANK_LIMIT,),
        sections=(training_section(results), _target_section(results["target_check"])),
        tags=UNLEARNING_TAGS,
    )


def below_chance(results: dict[str, Any]) -> list[str]:
    """Say so where the truth is avoided: whoever looks for what a model avoids finds it."""
    chance = results["target_check"]["chance"]
    if chance is None:
        return []
    measured = {(m.split, m.subject): m for m in read_measurements(results) if m.name == "multiple_choice"}
    warnings = []
    for split in ("forget_T", "forget_V"):
        edited, reference = measured.get((split, "edited")), measured.get((split, "reference"))
        if edited is None or edited.ci95 is None or edited.ci95[1] >= chance:
            continue
        if reference is None or reference.ci95 is None or edited.value < reference.ci95[0]:
            warnings.append(
                f"Group {split[-1]} is answered below chance ({format_value(edited)}, n = {edited.n}, chance"
                f" {chance:.3f}): true answers are avoided, which reveals them. one_sided=true ends at chance."
            )
    return warnings


def _target_section(check: dict[str, Any]) -> Section:
    title = "What the target promised"
    if not check["curve"]:
        return Section(title, (check["unchecked"],), where=("report", "card"))
    curve, splits = check["curve"], check["splits"]
    chosen = next((place for place, point in enumerate(curve) if point["chosen"]), 0)
    line = [point for point in curve if point["contrast"] == curve[chosen]["contrast"]]
    figure = lines(
        "What the target prefers at each strength",
        "",
        {split: [(point["strength"], point["accuracy"][split]) for point in line] for split in splits},
        "strength of the contrast",
        "accuracy of the target",
        marker=curve[chosen]["strength"],
    )
    rows = tuple(
        (
            point["contrast"],
            str(point["strength"]),
            *(f"{point['accuracy'][split]:.3f}" for split in splits),
            f"{point['greedy']:.3f}",
        )
        for point in curve
    )
    counts = ", ".join(f"{split} {check['n'][split]}" for split in splits)
    made = " The questions to forget ask which passage continues a text." if check.get("made_of") == "texts" else ""
    about = (
        "Before training, the target distribution itself was scored on group T of each split: the share of questions"
        " whose true choice it prefers, by the first token where short choices differ in it and else by the whole"
        " choice, and the share that it would say greedily. Training can reach at most this. The outlined row was"
        f" used. Questions: {counts}{_left_out(check)}; chance {check['chance']:.3f}.{made}"
    )
    table = Table(("contrast", "strength", *splits, "forget, greedy"), rows, chosen)
    return Section(title, (about,), (table,), (figure,), where=("report",))


def _left_out(check: dict[str, Any]) -> str:
    """How many questions could not be scored; earlier versions did not count them."""
    counts = ", ".join(f"{split} {count}" for split, count in check.get("left_out", {}).items())
    return f" (and could not be scored: {counts})" if counts else ""
