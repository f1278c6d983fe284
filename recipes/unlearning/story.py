"""What the unlearning methods say of their runs; all say the same."""

from typing import Any

from ...artifacts.reporting.sections import Story
from ..common.story import LOW_RANK_LIMIT, UNLEARNING_TAGS, low_rank_headline, training_section


def story(results: dict[str, Any]) -> Story:
    """From everything else that ``eval.json`` holds."""
    return Story(
        low_rank_headline(results),
        limits=(LOW_RANK_LIMIT,),
        sections=(training_section(results),),
        tags=UNLEARNING_TAGS,
    )
