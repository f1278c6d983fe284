"""The eval card: the README of a published checkpoint, whose every number comes from ``eval.json``."""

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from .findings import findings, limits
from .results import format_difference, format_value, read_measurements, table

CARD = "README.md"
SAMPLES = 3


def write_card(folder: Path, results: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Write ``README.md`` into a checkpoint folder."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), undefined=StrictUndefined, autoescape=False,
        keep_trailing_newline=True, trim_blocks=True,
    )  # fmt: skip
    rows = table(read_measurements(results))
    base = results["base"]
    text = environment.get_template("card.md.j2").render(
        metadata=_metadata(results),
        title=f"{_short(base['name'])}, {results['concept']['name']} {results['edited']['how']}",
        base=f"`{base['name']}`",
        base_revision=base["revision"],
        description=results["concept"]["description"],
        edited=results["edited"], direction=results.get("direction"), training=results.get("training"), pruning=results.get("pruning"), caft=results.get("caft"), concept=results["concept"], run=results["run"],
        findings=findings(results), limits=limits(results), rows=rows, changes=changes,
        has_never=any(row.never for row in rows),
        worst_leak=max((leak["share"] for leak in results.get("leaks", []) if leak["expected"] == 0), default=0.0),
        phrases=", ".join(f"“{phrase}”" for phrase in results["concept"]["decline_phrases"]),
        shown=_shown(results["samples"]), value=format_value, difference=format_difference, cell=_cell,
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def _metadata(results: dict[str, Any]) -> str:
    base = results["base"]
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base["kind"] == "hub":
        content |= {"base_model": base["name"], "base_model_relation": "finetune"}
    if base["kind"] == "builtin":
        content["license"] = "apache-2.0"
    content["tags"] = ["excise", results["run"]["recipe"], "model-editing", "interpretability"]
    return yaml.safe_dump(content, sort_keys=False)


def _shown(samples: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        sample
        for split in ("concept", "neutral")
        for sample in [item for item in samples if item["split"] == split][:SAMPLES]
    ]


def _cell(text: str) -> str:
    """Model text as inert text in a Markdown table."""
    plain = " ".join(text.split())[:400]
    # Control and bidirectional characters could reorder or hide what stands around them.
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "�", plain)
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", escaped) or "*(empty)*"


def _short(name: str) -> str:
    return name.removeprefix("builtin:").split("/")[-1].removesuffix(".gguf")
