"""What earlier versions wrote, read with today's names: ``eval.json``, ``audit.json`` and manifests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ..editing.errors import RequestError
from .files.forms import Form, validated
from .files.opened import Telling, Unreadable
from .files.parsed import read_object

Count = Annotated[int, Field(ge=0)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

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
    "judges": "judge",
    "benchmarks": "lm_eval",
}
"""Settings by their earlier names, with today's."""
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


class _Difference(Form):
    value: float
    ci95: Interval | None


class _Measured(Form):
    model_config = ConfigDict(extra="forbid")
    name: str
    split: str
    subject: Literal["base", "edited", "reference"]
    value: float
    unit: str
    better: str
    n: Count
    skipped: Count
    ci95: Interval | None
    difference: _Difference | None = None


class ModelRecord(Form):
    name: str


class ConceptRecord(Form):
    ref: str
    sha256: dict[str, str] = Field(default_factory=dict)


class RunRecord(Form):
    recipe: str
    settings: dict[str, Any]


class Results(Form):
    """``eval.json``; what a reader needs beyond this it must look for itself."""

    measurements: list[_Measured]
    base: ModelRecord | None = None
    reference: ModelRecord | None = None
    concept: ConceptRecord | None = None
    run: RunRecord | None = None
    warnings: list[str] = Field(default_factory=list)


class _Audit(Form):
    verdict: str
    models: dict[str, ModelRecord] = Field(default_factory=dict)
    concept: dict[str, Any] | None = None
    run: RunRecord | None = None
    reasons: list[str] = Field(default_factory=list)


class _File(Form):
    size: Count
    sha256: str


class _Manifest(Form):
    files: dict[str, _File]
    base: dict[str, Any]
    tensors_changed: list[dict[str, Any]] = Field(default_factory=list)


FORMS: dict[str, type[Form]] = {"eval.json": Results, "audit.json": _Audit, "manifest.json": _Manifest}
"""By the file's name."""


def read_json(path: Path, form: type[Form] | None = None) -> dict[str, Any]:
    """The content of an ``eval.json``, ``audit.json`` or manifest, with today's names.

    Args:
        form: What it must hold at least; by default what ``FORMS`` says of the file's name.

    Raises:
        RequestError: It cannot be read, or is not of that form.
    """
    place = f"{path.parent.name}/{path.name}"
    with Telling(RequestError, "excise did not write it so; fetch it or make it again").about(place):
        content = read_object(path)
        version = content.get("schema_version", SCHEMA_VERSION)
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise Unreadable(f"its schema_version is {version!r}; this excise reads 1 to {SCHEMA_VERSION}")
        content = upgraded(content)
        validated(form or FORMS[path.name], content)
    return content


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
