"""What distillation says of its runs."""

from typing import Any

from ...artifacts.reporting.sections import Story
from ..common.story import UNLEARNING_TAGS, tensors_changed, training_section

LIMIT = (
    "What the edited model still predicts was learned again, and weights that were not moved hold what they held before."
    " Only an audit says how much of the concept can be brought back."
)


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    edited, teacher = results["edited"], results["distilled"]["teacher"]
    settings = results["run"]["settings"]
    headline = (
        f"**What was edited.** `{teacher['name']}`, an edit of `{results['base']['name']}` against"
        f" *{results['concept']['description']}*, was distilled into a copy of itself whose weights were moved by"
        f" {settings['shrink']:g} toward noise ({tensors_changed(results)}; {edited['about']})."
    )
    return Story(headline, limits=(LIMIT,), sections=(training_section(results),), tags=UNLEARNING_TAGS)
