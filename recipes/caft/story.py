"""What concept-ablated fine-tuning says of its runs: what was ablated, what it did meanwhile, and the controls."""

from typing import Any

from ...artifacts.reporting.sections import Control, Section, Story, Table, measurement_from
from ..common.story import tensors_changed, training_section

CONTROLS = {
    "none": "without ablation",
    "random": "with as many random directions",
    "top_k": "with as many of the highest score",
}
"""Controls by the name that ``eval.json`` gives them."""


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    caft = results["caft"]
    controls = tuple(
        Control(CONTROLS[name], tuple(measurement_from(item) for item in items), in_findings=name == "none")
        for name, items in caft["controls"].items()
    )
    limit = (
        "Directions were taken out of the stream while training, and only then. The model may have learned the same in "
        "another way that these items do not show, and further training may bring it in."
    )
    return Story(
        _headline(results),
        limits=(limit,),
        sections=(training_section(results), _ablated(caft), *_during(caft)),
        controls=controls,
    )


def _headline(results: dict[str, Any]) -> str:
    edited, directions = results["edited"], results["caft"]["directions"]
    how = f"LoRA rank {edited['rank']}" if "rank" in edited else "whole weights"
    count = sum(len(one["names"]) for one in directions)
    ablation = (
        f"with directions ablated while training ({count}) so that it would not learn"
        f" *{results['concept']['description']}*"
        if directions
        else "without any ablation"
    )
    return (
        f"**What was trained.** `{results['base']['name']}` was fine-tuned ({tensors_changed(results)}; {how}, "
        f"{edited['about']}), {ablation}."
    )


def _ablated(caft: dict[str, Any]) -> Section:
    if not caft["directions"]:
        return Section("Ablated while training", ("Nothing was ablated.",))
    firing = ", each latent as far as it fires" if caft["remove"] == "latents" else ""
    about = (
        f"Source `{caft['source']}`, mode `{caft['mode']}`, value `{caft['value']}`{firing}. The directions are in "
        "`excise/directions.safetensors`. Nothing is ablated in this checkpoint."
    )
    rows = tuple(
        (
            one["place"],
            ", ".join(f"{name} ({score:.3f})" for name, score in zip(one["names"], one["scores"], strict=True)),
            _numbers(caft["projection"]["base"].get(one["place"], [])),
            _numbers(caft["projection"]["edited"].get(one["place"], [])),
        )
        for one in caft["directions"]
    )
    headers = ("place", "directions, with scores", "mean projection, base", "mean projection, edited")
    return Section("Ablated while training", (about,), (Table(headers, rows),))


def _during(caft: dict[str, Any]) -> tuple[Section, ...]:
    if not caft.get("during"):
        return ()
    about = (
        "While training, with the ablation paused: how much of what changed in the stream lies in the ablated span, and"
        " how much of the directions that the same source finds in the model at that step. Where the second falls, the"
        " concept moved elsewhere."
    )
    rows = tuple(
        (
            str(look["step"]),
            place,
            _numbers(values),
            f"{look['share_in_span'][place]:.3f}" if place in look["share_in_span"] else "none changed",
            f"{look['found_again'][place]:.3f}" if place in look["found_again"] else "",
        )
        for look in caft["during"]
        for place, values in look["projection"].items()
    )
    headers = ("step", "place", "mean projection", "change in the span", "found again in the span")
    return (Section("What changed while training", (about,), (Table(headers, rows),), where=("report",)),)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
