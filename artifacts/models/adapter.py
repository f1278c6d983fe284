"""PEFT adapters as models: merged once into their base, piece by piece, and kept in the cache like a converted file."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...editing.edits.base import Plan, WeightEdit
from ...editing.errors import RequestError, UnsupportedArchitecture
from ..checkpoints.adapter import Adapter, adapter_edit, read_adapter
from ..checkpoints.adapter_config import AdapterConfig, is_adapter
from ..checkpoints.export import Export, check_disk, check_editable, check_shapes, export_edit, required_bytes
from ..checkpoints.manifest import read_manifest, write_manifest
from ..checkpoints.read import Checkpoint, open_checkpoint
from ..checkpoints.staging import staged_folder
from ..events import Stage
from ..files.opened import sha256_of
from .cache import cache_folder
from .source import ModelSource, license_of

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a tokenizer, which an adapter may bring along."""
log = logging.getLogger(__name__)
Find = Callable[[str], ModelSource]
"""Finds a whole model by reference."""


@dataclass(frozen=True)
class PreparedMerge:
    """An adapter and its base, checked to fit together; no weight of the base was read yet."""

    source: ModelSource
    """The adapter's folder."""
    adapter: Adapter
    base: ModelSource
    checkpoint: Checkpoint
    edit: WeightEdit
    plan: Plan

    def describe(self) -> dict[str, Any]:
        """The adapter as JSON for publication: without local paths."""
        recorded = self.adapter.config.about.base_model_name_or_path
        return {
            "kind": self.source.kind,
            "name": self.source.name,
            "revision": self.source.revision,
            "sha256": self.adapter.sha256,
            # A path names folders of the machine where it was trained.
            "trained_on": recorded if recorded is None or _is_hub_id(recorded) else Path(recorded).name,
            "own_tokenizer": brings_tokenizer(self.source.folder),
        }


def prepare_merge(source: ModelSource, base: str | None, find: Find) -> PreparedMerge:
    """Read an adapter, find its base, and check that they fit.

    Args:
        source: The adapter's folder.
        base: The base to merge into; None takes the one that the adapter names.
        find: Finds a whole model by reference.

    Raises:
        RequestError: There is no such base, or the adapter does not fit it.
        CheckpointError: The adapter or the base is damaged.
    """
    adapter = read_adapter(source.folder, source.name)
    reference = base or recorded_base(source, adapter.config)
    found = find(reference)
    if is_adapter(found.folder):
        raise RequestError(
            f"the base of {source.name}, {reference}, is an adapter itself; merge that one first with `excise apply"
            f" {reference} --out OUT`, and give --base OUT"
        )
    if base:
        _say_other_base(adapter, found, base)
    checkpoint = open_checkpoint(found.folder)
    try:
        edit = adapter_edit(adapter, checkpoint)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{source.name} cannot be merged into {found.name}: {error}") from error
    plan = edit.plan(checkpoint.config, list(checkpoint.tensors))
    check_editable(checkpoint, plan)
    check_shapes(checkpoint, plan)
    return PreparedMerge(source, adapter, found, checkpoint, edit, plan)


def recorded_base(source: ModelSource, config: AdapterConfig) -> str:
    """Reference of the base that an adapter names.

    Raises:
        RequestError: It names none, or a folder that is not on this machine.
    """
    about = config.about
    name = about.base_model_name_or_path
    if not name:
        raise RequestError(f"{source.name} is an adapter and names no base; give its base with --base")
    if Path(name).is_dir() or name.startswith("builtin:"):
        return name
    if not _is_hub_id(name):
        raise RequestError(
            f"{source.name} is an adapter of the local model {Path(name).name}, which is not here; give its base with"
            " --base"
        )
    return f"{name}@{about.revision}" if about.revision else name


def merge(prepared: PreparedMerge, folder: Path, stage: Stage | None = None) -> Export:
    """Stream base and adapter into ``folder``, an empty staging folder, with the tokenizer that the adapter brings."""
    export = export_edit(prepared.edit, prepared.checkpoint, folder, stage)
    if brings_tokenizer(prepared.source.folder):
        for name in TOKENIZER:
            (folder / name).unlink(missing_ok=True)
            if (prepared.source.folder / name).is_file():
                shutil.copyfile(prepared.source.folder / name, folder / name)
    return export


def merged(source: ModelSource, base: str | None, find: Find) -> ModelSource:
    """An adapter as a model: merged into the cache, under the hashes of adapter and base.

    Raises:
        RequestError: There is no such base, or the adapter does not fit it.
        CheckpointError: The adapter or the base is damaged.
        ExciseError: The disk has too little space.
    """
    prepared = prepare_merge(source, base, find)
    digest = _digest(prepared)
    folder = cache_folder() / f"adapter-{digest[:16]}"
    if not folder.exists():
        check_disk(folder, required_bytes(prepared.checkpoint, prepared.plan))
        log.warning(
            "merging the adapter %s into %s, once; the merged model stays in the cache, %s",
            source.name,
            prepared.base.name,
            folder,
        )
        # Whole or not at all: a merge that was killed must not be taken for a model by the next run.
        with staged_folder(folder) as staging:
            export = merge(prepared, staging)
            write_manifest(
                staging,
                base=prepared.base.describe(),
                base_files=export.base_sha256,
                changes=export.changes,
                untied=export.untied,
                known=export.output_sha256,
                run={"recipe": "merge", "adapter": prepared.describe()},
            )
    manifest = read_manifest(folder)
    assert manifest is not None, "the cache writes one"
    record = {**prepared.describe(), "base": manifest["base"], "license": _license(prepared)}
    return ModelSource("adapter", source.name, folder, source.revision, digest, adapter=record, base=prepared.base)


def brings_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder holds a tokenizer of its own, as trainers save it."""
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    )


def _digest(prepared: PreparedMerge) -> str:
    """What the merged model depends on."""
    files = sorted(path for path in prepared.base.folder.iterdir() if path.is_file())
    # A commit names the content already; hashing a large base takes minutes.
    base = prepared.base.sha256 or prepared.base.revision or {path.name: sha256_of(path) for path in files}
    own = {
        name: sha256_of(prepared.source.folder / name)
        for name in TOKENIZER
        if brings_tokenizer(prepared.source.folder) and (prepared.source.folder / name).is_file()
    }
    parts = ["merge 1", prepared.adapter.sha256, own, base]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _license(prepared: PreparedMerge) -> str | None:
    named: str | None = prepared.base.describe()["license"]
    return named or license_of(prepared.source.folder)


def _say_other_base(adapter: Adapter, found: ModelSource, base: str) -> None:
    recorded = adapter.config.about.base_model_name_or_path
    if recorded and recorded not in (base, found.name) and Path(recorded).resolve() != found.folder.resolve():
        log.warning("%s says that it was trained on %s; it is merged into %s", adapter.name, recorded, base)


def _is_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and "\\" not in name
