"""The eval card: the README of a published checkpoint, whose every number comes from ``eval.json``."""

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ...eval.measurements import MEASUREMENTS, label_of
from ..checkpoints.manifest import MANIFEST
from ..files.opened import OF_A_CHECKPOINT
from ..files.parsed import read_object
from .findings import declining, findings, limits
from .pages import visible
from .results import (
    INTERVALS,
    decoding,
    format_difference,
    format_value,
    measured_on,
    read_measurements,
    split_meanings,
    table,
)
from .sections import Story, read_story

CARD = "README.md"
SAMPLES = 3


def write_card(folder: Path, results: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Write ``README.md`` into a checkpoint folder."""
    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "templates"),
        undefined=StrictUndefined,
        # A card is Markdown, so HTML is not escaped; texts of models go through _cell.
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    rows, story = table(read_measurements(results)), read_story(results)
    base, concept = results["base"], results["concept"]
    text = environment.get_template("card.md.j2").render(
        metadata=_metadata(results, story),
        title=f"{_short(base['name'])}, {concept['name']} {results['edited']['how']}",
        headline=story.headline or _headline(results),
        base_revision=base["revision"],
        run=results["run"],
        reply_tokens=results["run"]["settings"].get("max_new_tokens", 24),
        has_chat_template=_has_chat_template(folder),
        findings=findings(results),
        declining=declining(results),
        limits=limits(results),
        rows=rows,
        changes=changes,
        has_reference=any(row.reference for row in rows),
        split_meanings=split_meanings(rows),
        measured_on=measured_on(concept),
        made=concept.get("made", []),
        sections=[section for section in story.sections if "card" in section.where],
        controls=[
            (control.name, label_of(item.name), item.split, str(item.n), format_value(item))
            for control in story.controls
            for item in control.values
        ],
        phrases=", ".join(f"“{phrase}”" for phrase in concept["decline_phrases"]),
        shown=_shown(results["samples"]),
        value=lambda measurement: _unbroken(format_value(measurement)),
        difference=lambda measurement: _unbroken(format_difference(measurement)),
        unbroken=_unbroken,
        intervals=INTERVALS,
        decoding=decoding(results.get("decoding", {}).get("set_aside", {}), of="The base's"),
        cell=_cell,
        plain=_plain,
    )
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


def _metadata(results: dict[str, Any], story: Story) -> str:
    """Front matter by which the Hub finds and sorts a model; the base's own results are not repeated."""
    content = _origin(results["base"]) | {"tags": [*TAGS, results["run"]["recipe"], *story.tags]}
    indexed = {name for name, row in MEASUREMENTS.items() if row.hub}
    edited = [item for item in results["measurements"] if item["subject"] == "edited" and item["name"] in indexed]
    if edited:
        title = f"{_short(results['base']['name'])}-{results['concept']['name']}"
        content["model-index"] = [{"name": title, "results": [_result(item, results["concept"]) for item in edited]}]
    return _yaml(content)


def _origin(base: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base["kind"] == "hub" or (base["kind"] == "adapter" and base["revision"]):
        content |= {"base_model": base["name"], "base_model_relation": "finetune"}
    return content | ({"license": base["license"]} if base.get("license") else {})


def _result(item: dict[str, Any], concept: dict[str, Any]) -> dict[str, Any]:
    name = f"{label_of(item['name'])} ({item['unit']}, n = {item['n']})"
    return {
        "task": {"type": "text-generation"},
        "dataset": {
            "type": concept["ref"].replace(":", "-"),
            "name": f"{concept['name']}, {item['split']}",
            "split": item["split"],
        },
        "metrics": [{"type": item["name"], "name": name, "value": round(item["value"], 6), "verified": False}],
    }


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


def _unbroken(value: str) -> str:
    """A value whose interval stays on one line in a narrow column."""
    return value.replace(", ", ",\u00a0")


def _plain(text: str) -> str:
    """A cell of ours in a Markdown table: inert, and as it is where nothing in it could be taken for Markdown."""
    return " ".join(visible(text).split()).replace("<", "&lt;").replace("|", "\\|")


def _headline(results: dict[str, Any]) -> str:
    """What was edited, where no story says it."""
    edited = results["edited"]
    return (
        f"**What was edited.** `{results['base']['name']}` was {edited['how']}, on"
        f" *{results['concept']['description']}* ({edited['tensors_changed']} of {edited['tensors_declared']} tensors"
        " changed)."
    )


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    with OF_A_CHECKPOINT.about(file.name):
        return file.is_file() and bool(read_object(file).get("chat_template"))


def _short(name: str) -> str:
    return name.removeprefix("builtin:").split("/")[-1].removesuffix(".gguf")
