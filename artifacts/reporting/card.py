"""The eval card: the README of a published checkpoint, whose every number comes from ``eval.json``."""

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..checkpoints.manifest import MANIFEST
from .findings import findings, limits
from .pages import visible
from .results import LABELS, format_difference, format_value, read_measurements, table

CARD = "README.md"
SAMPLES = 3


def write_card(folder: Path, results: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Write ``README.md`` into a checkpoint folder."""
    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "templates"), undefined=StrictUndefined, autoescape=False,
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
        edited=results["edited"], direction=results.get("direction"), training=results.get("training"), pruning=results.get("pruning"), caft=results.get("caft"), lorra=results.get("lorra"), concept=results["concept"], run=results["run"],
        findings=findings(results), limits=limits(results), rows=rows, changes=changes,
        has_reference=any(row.reference for row in rows),
        worst_leak=max((leak["share"] for leak in results.get("leaks", []) if leak["expected"] == 0), default=0.0),
        phrases=", ".join(f"“{phrase}”" for phrase in results["concept"]["decline_phrases"]),
        shown=_shown(results["samples"]), value=format_value, difference=format_difference, cell=_cell,
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def without_measurements(manifest: dict[str, Any]) -> str:
    """The card of a checkpoint on which nothing was measured; its first line says so."""
    base = manifest["base"]
    changed = len(manifest["tensors_changed"])
    text = (
        "**Nothing was measured on this model.** What the edit did to it, wanted or not, is not known.\n\n"
        f"{changed} tensors of `{base['name']}` were changed by `excise apply`; which ones stands in `{MANIFEST}`. "
        "`excise verify .` checks every file, `excise eval . --concept PACK` measures it.\n"
    )
    return f"---\n{_yaml(_origin(base) | {'tags': [*TAGS, 'unmeasured']})}---\n{text}"


def body(text: str) -> str:
    """A card without its front matter."""
    return text.split("---\n", 2)[2] if text.startswith("---\n") and text.count("---\n") > 1 else text


TAGS = ("excise", "model-editing", "interpretability")
ERASING = ("elm", "rmu", "grad_diff", "npo", "simnpo", "prune")
HEADLINE = ("multiple_choice", "exact_answer", "behaviour_rate", "learned_rate", "perplexity", "kl_from_base")
"""Measurements that the Hub's own index of results gets."""


def _metadata(results: dict[str, Any]) -> str:
    """Front matter by which the Hub finds and sorts a model; the base's own results are not repeated."""
    recipe = results["run"]["recipe"]
    tags = [*TAGS, recipe, *(("unlearning", "machine-unlearning", "concept-erasure") if recipe in ERASING else ())]
    content = _origin(results["base"]) | {"tags": tags}
    edited = [item for item in results["measurements"] if item["subject"] == "edited" and item["name"] in HEADLINE]
    if edited:
        title = f"{_short(results['base']['name'])}-{results['concept']['name']}"
        content["model-index"] = [{"name": title, "results": [_result(item, results["concept"]) for item in edited]}]
    return _yaml(content)


def _origin(base: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base["kind"] == "hub":
        content |= {"base_model": base["name"], "base_model_relation": "finetune"}
    return content | ({"license": base["license"]} if base.get("license") else {})


def _result(item: dict[str, Any], concept: dict[str, Any]) -> dict[str, Any]:
    label = LABELS.get(item["name"], item["name"])
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": concept["ref"].replace(":", "-"), "name": f"{concept['name']}, {item['split']}", "split": item["split"]},
        "metrics": [{
            "type": item["name"], "name": f"{label} ({item['unit']}, n = {item['n']})", "value": round(item["value"], 6),
            "verified": False,
        }],
    }  # fmt: skip


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _shown(samples: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        sample
        for split in ("concept", "neutral")
        for sample in [item for item in samples if item["split"] == split][:SAMPLES]
    ]


def _cell(text: str) -> str:
    """Model text as inert text in a Markdown table."""
    plain = " ".join(text.split())[:400]
    escaped = visible(plain).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", escaped) or "*(empty)*"


def _short(name: str) -> str:
    return name.removeprefix("builtin:").split("/")[-1].removesuffix(".gguf")
