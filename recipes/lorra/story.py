"""What representation tuning says of its runs: how it was trained, and where prompts lie before and after."""

from typing import Any

from ...artifacts.reporting.sections import Section, Story, Table
from ..common.story import LOW_RANK_LIMIT, tensors_changed, training_section
from .vectors import BATCH


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    lorra, edited = results["lorra"], results["edited"]
    headline = (
        f"**What was edited.** `{results['base']['name']}` was {edited['how']} of"
        f" *{results['concept']['description']}*: a low-rank update moves its stream by {lorra['strength']} times the"
        f" distance between {lorra['pairs']} pairs of prompts with and without it ({tensors_changed(results)}; rank"
        f" {edited['rank']}, {edited['about']})."
    )
    rows = tuple(
        (
            place,
            *(
                f"{lorra['along'][model][place][side]:.2f}"
                for side in ("positive", "negative")
                for model in ("base", "edited")
            ),
        )
        for place in lorra["along"]["base"]
    )
    about = (
        "0 is where prompts without the concept lay in the base, 1 where those with it did (means of at most "
        f"{BATCH} prompts each)."
    )
    headers = ("place", "with it: base", "with it: edited", "without it: base", "without it: edited")
    along = Section("Where prompts lie along the vector", (about,), (Table(headers, rows),))
    return Story(headline, limits=(LOW_RANK_LIMIT,), sections=(training_section(results), along))
