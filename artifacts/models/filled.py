"""Whether loading filled every weight of a model: transformers only warns, and goes on with random ones."""

from collections.abc import Mapping
from typing import Any

from ...editing.errors import CheckpointError


def check_filled(name: str, info: Mapping[str, Any], advice: str) -> None:
    """Check what ``from_pretrained`` says of its loading.

    Raises:
        CheckpointError: Weights are missing, left over or of another shape; the message names the first ones.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Of a mismatch the shapes are told beside the name.
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(problem, ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{name} has {len(names)} {problem.replace('_', ' ')}, the first is {names[0]}"
                f"{': ' + ', '.join(names[:3]) + more if len(names) > 1 else ''}; transformers would use random "
                f"weights there; {advice}"
            )
