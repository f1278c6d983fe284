"""What pruning says of its runs: which units were silenced, and what silencing others does."""

from typing import Any

from ...artifacts.reporting.sections import Control, Section, Story, bars
from ..common.story import UNLEARNING_TAGS, multiple_choice_control, tensors_changed


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    pruning, edited = results["pruning"], results["edited"]
    score = pruning["score"].replace("_", " ")
    headline = (
        f"**What was edited.** Units that *{results['concept']['description']}* needs were silenced in "
        f"`{results['base']['name']}`: {edited['about']} ({tensors_changed(results)}; scored by {score}, semantics "
        f"`{edited['semantics']}`)."
    )
    validation = pruning["validation"]
    checked = (
        (
            (
                f"Removing {validation['units']} units one by one, the rank correlation of score and true effect is "
                f"{validation['spearman']:.2f}."
            ),
        )
        if validation
        else ()
    )
    about = (
        f"Scored by {score}, semantics `{pruning['semantics']}`. Controls silence as many other units: random ones,"
        " matched in layer and size, and the largest."
    )
    layers = bars("Neurons silenced in each layer", "", pruning["by_layer"], "layer", "neurons silenced")
    units = Section("Units silenced", (about, *checked), figures=(layers,))
    return Story(
        headline,
        limits=("Units were silenced by a score on the pack's contexts; what other units encode is still there.",),
        sections=(units,),
        controls=_as_controls(pruning["controls"]),
        tags=UNLEARNING_TAGS,
    )


def _as_controls(compared: dict[str, dict[str, Any]]) -> tuple[Control, ...]:
    names = {
        "chosen": "the units that were chosen",
        "random": "random units",
        "largest": "the largest units",
    }
    return tuple(
        multiple_choice_control(names[name], splits, in_findings=name == "random") for name, splits in compared.items()
    )
