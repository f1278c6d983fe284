"""The description of a model's source, and the models in the package."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..files.opened import MAX_JSON, OF_A_CHECKPOINT, Unreadable, read_text
from ..files.parsed import parse_yaml, read_json

BUILTIN = Path(__file__).parents[1] / "builtin"


@dataclass(frozen=True)
class ModelSource:
    """A model in a local folder; its weights were not read yet."""

    kind: Literal["builtin", "hub", "local", "gguf", "adapter"]
    name: str
    """How it can be named in public: ``builtin:NAME``, a Hub id, or the last part of a local path."""
    folder: Path
    revision: str | None = None
    """40-hex commit of a Hub model."""
    sha256: str | None = None
    """SHA-256 of the GGUF file that a model was converted from; of an adapter and its base, for a merged one."""
    adapter: dict[str, Any] | None = None
    """What may be published about the adapter that was merged, its base included."""
    dequantized_from: str | None = None
    """Format of the quantized weights that the folder's bfloat16 weights were computed from."""
    base: "ModelSource | None" = None
    """The base that an adapter was merged into."""

    @property
    def address(self) -> str:
        """The reference to give to a command, with the commit if there is one."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def describe(self) -> dict[str, Any]:
        """The source as JSON for publication: without local paths."""
        if self.adapter is not None:
            record = {"kind": self.kind, "name": self.name, "revision": self.revision, "gguf_sha256": None}
            return {**record, "license": self.adapter["license"], "adapter": self.adapter}
        return {
            "kind": self.kind,
            "name": self.name,
            "revision": self.revision,
            "gguf_sha256": self.sha256,
            "license": "apache-2.0" if self.kind == "builtin" else license_of(self.folder),
            **({"dequantized_from": self.dequantized_from} if self.dequantized_from else {}),
        }


@dataclass(frozen=True)
class ModelInMemory:
    """A model and its tokenizer that the caller loaded."""

    name: str
    """What tables and reports call it."""
    model: Any = field(repr=False)
    """A causal language model of transformers."""
    tokenizer: Any = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """What may be published about where the model came from: nothing but its name."""
        return {"kind": "memory", "name": self.name, "revision": None, "gguf_sha256": None, "license": None}


def license_of(folder: Path) -> str | None:
    """The licence that the model's card names, or None."""
    card = folder / "README.md"
    try:
        text = read_text(card, MAX_JSON) if card.exists() else ""
    except (OSError, Unreadable):
        return None
    if not text.startswith("---"):
        return None
    try:
        content = parse_yaml(text.split("---")[1])
    except Unreadable:
        return None
    name = content.get("license") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def read_record(path: Path) -> list[dict[str, Any]]:
    """What was found out about every model type when this version was made, as ``benchmarks/architectures.py`` wrote it."""
    with OF_A_CHECKPOINT.about(path.name):
        records: list[dict[str, Any]] = read_json(path)
    return records


def builtin_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.name for path in BUILTIN.glob("*") if (path / "config.json").exists())
