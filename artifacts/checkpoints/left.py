"""What an edit of the language model leaves as it is: other towers, and tensors that transformers does not load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...editing.architectures import architecture_of, layer_count
from ...editing.wiring.row import left_alone

if TYPE_CHECKING:
    # The name of a type alone: cards say what was left alone, and need no torch for it.
    from .read import Checkpoint

TOWERS = {"vision_config": "images", "audio_config": "sound"}


def parts_left(checkpoint: Checkpoint) -> dict[str, Any]:
    """Towers by what they read, and the number and first names of tensors that are not loaded; empty if there are none."""
    config = checkpoint.config
    names = left_alone(architecture_of(config), list(checkpoint.tensors), layer_count(config))
    towers = [what for key, what in TOWERS.items() if isinstance(config.get(key), dict)]
    left = {"towers": towers, "not_loaded": len(names), "first_not_loaded": names[:3]}
    return left if towers or names else {}


def in_words(left: dict[str, Any]) -> list[str]:
    """Sentences for a card and a terminal."""
    said = []
    if towers := left.get("towers"):
        what = " and ".join(towers)
        said.append(
            f"The language model alone was edited. What reads {what} is as it was, so tokens of {what} may bring in what"
            " was taken out of the text's; nothing was measured on them."
        )
    if count := left.get("not_loaded"):
        said.append(
            f"{count} stored tensors that transformers does not load ({', '.join(left['first_not_loaded'])}"
            f"{', …' if count > len(left['first_not_loaded']) else ''}) are as they were. A program that decodes with them,"
            " several tokens at once, still uses the base's."
        )
    return said
