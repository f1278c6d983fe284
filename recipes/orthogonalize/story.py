"""What orthogonalization says of its runs: where the direction comes from, how it was chosen, what is left of it."""

from typing import Any

from ...artifacts.reporting.results import format_value, read_measurements
from ...artifacts.reporting.sections import Section, Story, Table, heat_map
from ..common.story import tensors_changed


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    direction, edited = results["direction"], results["edited"]
    headline = (
        f"**What was edited.** {_what(edited)} for *{results['concept']['description']}* was taken out of the weights of "
        f"`{results['base']['name']}` ({tensors_changed(results)}, of those that write to the residual stream; variant "
        f"`{edited['variant']}`, embeddings {_embeddings(edited)}{_mlps(edited)})."
    )
    warnings = []
    if not direction["passed_filters"]:
        used = next(c for c in direction["candidates"] if all(c[k] == direction[k] for k in ("point", "position")))
        warnings.append(f"The direction failed the filters: {used['rejected']}. Expect little effect, or damage.")
    # Runs that do not say edited the embeddings wholly.
    if edited["tied"] and edited["embeddings"] == "edit" and edited.get("embedding_strength", 1.0):
        warnings.append("The embedding is also the unembedding of this model, so both were edited.")
    limit = (
        f"{_what(edited)} was removed from what the weights write. Whatever the model encodes in other directions, or can "
        "relearn by fine-tuning, is still there."
    )
    return Story(
        headline,
        findings=tuple(
            f"With the direction added, neutral replies of the base show the concept: {format_value(item)}, n ="
            f" {item.n}."
            for item in read_measurements(results)
            if (item.name, item.subject) == ("induced_rate", "base")
        ),
        warnings=tuple(warnings),
        limits=(limit,),
        sections=(_origin(results), _candidates(direction), _leak_section(results)),
    )


def _what(edited: dict[str, Any]) -> str:
    return "One direction a layer" if edited.get("per_layer") else "One direction"


def _embeddings(edited: dict[str, Any]) -> str:
    """How the embeddings were edited; older results name no strength for them and edited them wholly, or not at all."""
    strength = edited.get("embedding_strength", 0.0 if edited["embeddings"] == "skip" else 1.0)
    if not strength:
        return "unchanged"
    return f"`{edited['embeddings']}`" if strength == 1.0 else f"`{edited['embeddings']}` at strength {strength:g}"


def _mlps(edited: dict[str, Any]) -> str:
    """What MLPs lose, where it is another share than the rest of their layer loses."""
    strengths = edited.get("mlp_strengths")
    if strengths is None:
        return ""
    return f", MLPs at strength {min(strengths):g} to {max(strengths):g}" if any(strengths) else ", MLPs unchanged"


def _origin(results: dict[str, Any]) -> Section:
    direction = results["direction"]
    worst = max((leak["share"] for leak in results["leaks"] if leak["expected"] == 0), default=0.0)
    about = (
        f"{direction['source'].replace('_', ' ').capitalize()} of {direction['pairs']['train']} contrast pairs of"
        f" concept `{results['concept']['ref']}`, at the input of layer {direction['point']}, position"
        f" {direction['position']} of the prompt; chosen among {len(direction['candidates'])} candidates on"
        f" {direction['pairs']['validation']} other pairs. All scores are in `excise/edit.json`."
    )
    if results["edited"].get("per_layer"):
        about += " Each layer loses the direction at its own output, at the same position of the prompt; the embeddings lose this one."
    check = (
        f"Leak check: at most {worst:.2e} of the component is left in what any edited sublayer writes on real inputs."
    )
    return Section("Where the direction comes from", (about, check))


MAPS = {
    "bypass": (
        "Bypass",
        "How strongly the concept shows on its own items while the direction is ablated; lower is better.",
        False,
    ),
    "induce": (
        "Induce",
        "How strongly it shows on neutral items while the direction is added; higher is better.",
        True,
    ),
    "kl": ("KL", "How far ablation moves neutral text; lower is better.", False),
}
"""Scores of candidates: title, what it says, whether higher is better."""


def _candidates(direction: dict[str, Any]) -> Section:
    by_place = {(one["point"], one["position"]): one for one in direction["candidates"]}
    points, positions = (sorted({place[axis] for place in by_place}) for axis in (0, 1))
    grid = [[by_place[point, position] for position in positions] for point in points]
    figures = []
    for key, (title, about, higher_is_better) in MAPS.items():
        units = "nats a token" if key == "kl" else direction["probe"]["units"]
        figures.append(
            heat_map(
                f"{title} ({units})",
                about,
                ["layer", *map(str, points)],
                [str(position) for position in positions],
                [[one[key] for one in row] for row in grid],
                [[one["rejected"] or "passes the filters" for one in row] for row in grid],
                (points.index(direction["point"]), positions.index(direction["position"])),
                higher_is_better=higher_is_better,
            )
        )
    about = (
        "Each cell is one candidate: a point of the residual stream (the input of that layer) and a position counted"
        " from the end of the prompt. The outlined one was used. “–” was rejected before scoring; the reason shows on"
        " hover and in `excise/edit.json`."
    )
    failed = "" if direction["passed_filters"] else " **The one that was used failed the filters.**"
    return Section("How the direction was chosen", (about + failed,), figures=tuple(figures), where=("report",))


def _leak_section(results: dict[str, Any]) -> Section:
    about = (
        "What each sublayer still writes along the removed direction, on real inputs, as a share of what it wrote"
        f" before. More than {results['leak_tolerance']} above the expected share stops the run."
    )
    rows = tuple(
        (
            "–" if leak["layer"] is None else str(leak["layer"]),
            leak["sublayer"],
            f"{leak['share']:.2e}",
            f"{leak['of_write']:.2e}",
            str(leak["expected"]),
        )
        for leak in results["leaks"]
    )
    headers = ("layer", "sublayer", "left, share of before", "left, share of the write", "expected")
    return Section("Leak check", (about,), (Table(headers, rows),), where=("report",))
