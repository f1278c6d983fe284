"""What earlier versions wrote, read with today's names: ``eval.json``, ``audit.json`` and manifests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
"""Of ``eval.json``, ``audit.json`` and the manifest. Version 1 was written until 0.1."""

RENAMED_SETTINGS = {
    "never": "reference",
    "reply_tokens": "max_new_tokens",
    "accumulation": "gradient_accumulation_steps",
    "clip": "max_grad_norm",
    "eta": "strength",
    "eta_ramp": "strength_ramp",
    "stand_ins": "reference_subjects",
    "kept_tokens": "stored_tokens",
    "most_contexts": "max_contexts",
    "at": "target_layers",
    "ablate": "ablated_layers",
}
"""Settings by their names in version 1, with today's."""
RENAMED_MODELS = {"testbed-never": "testbed-reference"}
"""Built-in models by their names in version 1, with today's."""
_KEYS = {"never": "reference", "recalled": "reused"}
_VALUES = {
    "never": "reference",
    "comes_back": "recovers",
    "resists": "partially_robust",
    "like_never_learned": "indistinguishable_from_never_trained",
    **{f"builtin:{old}": f"builtin:{new}" for old, new in RENAMED_MODELS.items()},
}
_WHERE_VALUES_MEAN_THAT = ("subject", "verdict", "floor_is", "recalled", "name", "ref")


def read_json(path: Path) -> dict[str, Any]:
    """The content of an ``eval.json``, ``audit.json`` or manifest, with today's names.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON.
    """
    return upgraded(json.loads(path.read_text(encoding="utf-8")))


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The same content with today's names; content of today is returned as it is."""
    if not isinstance(content, dict) or content.get("schema_version") != 1:
        return content
    renamed: dict[str, Any] = _with_new_names(content)
    for run in (renamed, renamed.get("run")):
        if isinstance(run, dict) and isinstance(run.get("settings"), dict):
            run["settings"] = {RENAMED_SETTINGS.get(key, key): value for key, value in run["settings"].items()}
    if isinstance(training := renamed.get("training"), dict) and "eta" in training:
        training["strength"] = training.pop("eta")
    return {**renamed, "schema_version": SCHEMA_VERSION}


def _with_new_names(content: Any, key: str = "") -> Any:
    if isinstance(content, Mapping):
        return {_KEYS.get(name, name): _with_new_names(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_new_names(value, key) for value in content]
    # Values are renamed only under keys where they are names; in a prompt or reply the same word is text.
    return _VALUES.get(content, content) if isinstance(content, str) and key in _WHERE_VALUES_MEAN_THAT else content
