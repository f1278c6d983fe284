"""What recipes say of their runs, and the parts that several of them say alike."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from ...artifacts.reporting.sections import Control, Section, Story, Table
from ...eval.measurements import MEASUREMENTS
from ...eval.statistics import Measurement
from .. import RECIPES
from .kl_budget import RECORD, in_words

UNLEARNING_TAGS = ("unlearning", "machine-unlearning", "concept-erasure")


def tell(results: dict[str, Any]) -> Story:
    """The story of a run, told by the function ``story`` of its recipe's module, or ``plain_story``.

    Args:
        results: Everything else that ``eval.json`` holds.
    """
    row = RECIPES.get(results["run"]["recipe"])
    story = getattr(import_module(row.module), "story", plain_story) if row else plain_story
    told: Story = story(results)
    return replace(told, sections=(*_choice_section(results), *_strength_section(results), *told.sections))


def _choice_section(results: dict[str, Any]) -> tuple[Section, ...]:
    """That a search chose the settings, and on what."""
    settings = results["run"].get("settings", {})
    half = settings.get("items", "all")
    if half == "all":
        return ()
    if trials := settings.get("chosen_from"):
        first = f"The settings were chosen from {trials} trials of `excise search`, by one half of the pack's items."
    else:
        first = "One half of the pack's items was measured."
    other = "never asked" if half == "report" else "chooses by"
    second = f"Every figure here is of the half that a search {other}: no subject stands in both."
    return (Section("How the settings were chosen", (f"{first} {second}",)),)


def _strength_section(results: dict[str, Any]) -> tuple[Section, ...]:
    """How a budget chose the edit's strength, whatever the recipe."""
    record = results.get(RECORD)
    if not record:
        return ()
    rows = tuple((f"{one['strength']:.4g}", f"{one['divergence']:.4g}") for one in record["tries"])
    table = Table(("strength", f"KL from the {record.get('of', 'base')}, nats per token"), rows)
    sentence = in_words(record)
    return (Section("How the strength was chosen", (f"{sentence[0].upper()}{sentence[1:]}.",), (table,)),)


def plain_story(results: dict[str, Any]) -> Story:
    """What can be said of a recipe that says nothing itself: how it was trained, if it was."""
    if "training" not in results:
        return Story()
    low_rank = "rank" in results["edited"]
    return Story(
        low_rank_headline(results) if low_rank else "",
        limits=(LOW_RANK_LIMIT,) if low_rank else (),
        sections=(training_section(results),),
    )


def tensors_changed(results: dict[str, Any]) -> str:
    """How many tensors the edit changed, of those that it could."""
    edited = results["edited"]
    return f"{edited['tensors_changed']} of {edited['tensors_declared']} tensors changed"


def low_rank_headline(results: dict[str, Any]) -> str:
    """What was edited, where a low-rank update was trained against a concept."""
    edited = results["edited"]
    return (
        f"**What was edited.** A low-rank update against *{results['concept']['description']}* was added to the weights"
        f" of `{results['base']['name']}` ({tensors_changed(results)}; rank {edited['rank']}, {edited['about']})."
    )


def multiple_choice_control(name: str, splits: Mapping[str, Any], *, in_findings: bool) -> Control:
    """What a control answers, split by split, from what its run recorded: ``value``, ``n`` and ``ci95``."""
    kind = MEASUREMENTS["multiple_choice"]
    return Control(
        name,
        tuple(
            Measurement(
                "multiple_choice", split, "edited", one["value"], "accuracy", kind.better(split), one["n"], 0,
                (one["ci95"][0], one["ci95"][1]),
            )
            for split, one in splits.items()
        ),
        in_findings=in_findings,
    )  # fmt: skip


LOW_RANK_LIMIT = (
    "The update was trained on the pack's contexts. Other ways to ask may still bring the knowledge out, and"
    " fine-tuning may bring it back."
)


def training_section(results: dict[str, Any]) -> Section:
    """How an adapter or whole weights were trained."""
    training = results["training"]
    adapter = (
        ("`adapter/` holds the same update as a PEFT adapter of the base.",) if "rank" in results["edited"] else ()
    )
    about = f"{training['about']} {training['steps']} steps of {training['rows']} sequences; {training['data']}."
    return Section("How it was trained", (about, *adapter))
