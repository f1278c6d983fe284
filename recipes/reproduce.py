"""Make a published checkpoint again from its record, and compare the result with the published one."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.checkpoints.manifest import package_versions, platform_of, read_manifest, verify_folder
from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.files.opened import sha256_of
from ..artifacts.models.find import find_model
from ..artifacts.reporting.outcomes import published_reference
from ..artifacts.reporting.results import RESULTS, read_measurements
from ..artifacts.upgrade import read_json
from ..editing.errors import RequestError
from ..eval.statistics import Measurement
from ..recipes import RECIPES
from .common.run_folder import refuse_taken
from .common.settings import load_settings


@dataclass(frozen=True)
class ReproduceJob:
    """A published checkpoint and the run that makes it again."""

    folder: Path
    published: dict[str, Any]
    """Its ``eval.json``."""
    recipe: Any
    """The recipe's module."""
    run: Any
    """The job that the recipe prepared."""
    out: Path
    differences: tuple[str, ...]
    """Packages and platform that differ from the recorded ones, as text."""


@dataclass(frozen=True)
class Reproduced:
    """How the new checkpoint compares with the published one."""

    out: Path
    identical: bool
    """All weights have the same SHA-256."""
    changed_files: tuple[str, ...]
    outside: tuple[str, ...]
    """Measurements whose new value is missing or outside the published interval, as text."""
    compared: int
    """Number of published measurements."""
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the weights are the same; on another platform, whether all measurements are in their intervals."""
        return self.identical or (bool(self.differences) and not self.outside)


def prepare(
    folder: Path, out: Path, *, model: str | None = None, concept: str | None = None, files: Sequence[str] = ()
) -> ReproduceJob:
    """Read the record, and check that base and concept are the recorded ones.

    Args:
        folder: The published checkpoint.
        out: The new run's folder.
        model: Path of the base, if it was local.
        concept: Path of the concept pack, if it was local.
        files: ``KEY=PATH`` for each other setting that named a local file; the record holds only the file's name.

    Raises:
        RequestError: There is no record, or the base, the concept or a file differs from it.
        VerifyError: The folder is not as it was published.
    """
    refuse_taken(out)
    verify_folder(folder)
    if not (folder / RESULTS).is_file():
        raise RequestError(
            f"{folder} holds no {RESULTS}, so its recipe is unknown; apply its edit with `excise apply` instead"
        )
    published = read_json(folder / RESULTS)
    manifest = read_manifest(folder)
    assert manifest is not None, "verified above"
    base, run, name = published["base"], published["run"], published["run"]["recipe"]
    if name not in RECIPES:
        raise RequestError(
            f"it was made by the recipe {name}, which this version of excise lacks; recipes: {', '.join(RECIPES)}"
        )
    reference = model or _reference(base)
    source = find_model(reference)
    hashes = {shard.path.name: sha256_of(shard.path) for shard in open_checkpoint(source.folder).shards}
    if hashes != manifest["base"]["files"]:
        raise RequestError(
            f"{source.name} is not the recorded base ({base['name']}): its weights differ; give the base with --model"
        )
    wanted = published["concept"]
    pack = load_concept(concept or wanted["ref"]) if concept or wanted["ref"].startswith("builtin:") else None
    if pack is None:
        raise RequestError(f"the concept {wanted['ref']} was a local pack; give its folder with --concept DIR")
    if pack.sha256 != wanted["sha256"]:
        raise RequestError(
            f"{pack.ref} is not the recorded concept pack: its files differ; give that pack with --concept DIR"
        )
    module = importlib.import_module(RECIPES[name].module)
    elsewhere = _elsewhere(run["settings"], files)
    flags = {
        **{key: value for key, value in run["settings"].items() if value is not None},
        **elsewhere,
        "model": reference,
        "concept": concept or wanted["ref"],
        "out": out,
        "device": run["device"],
        "dtype": run["dtype"],
    }
    settings = load_settings(getattr(module, RECIPES[name].settings), None, [], flags)
    differences = [
        f"{key} {before} then, {now.get(key, 'none')} now"
        for then, now in ((manifest["packages"], package_versions()), (manifest.get("platform", {}), platform_of()))
        for key, before in then.items()
        if now.get(key) != before
    ]
    return ReproduceJob(folder, published, module, module.prepare(settings, resume=False), out, tuple(differences))


def run(prepared: ReproduceJob, events: Events) -> Reproduced:
    """Run the recipe again and compare weights and measurements with the published ones."""
    finished = prepared.recipe.run(prepared.run, events)
    made = finished.out / "checkpoint"
    names = sorted(path.name for path in prepared.folder.glob("*.safetensors"))
    assert names, "a verified checkpoint has weights"
    changed = [name for name in names if not _same(prepared.folder / name, made / name)]
    before, after = _edited(prepared.published), _edited(finished.results)
    shared = [key for key in before if key in after]
    outside = [f"{name} ({split}) was not measured again" for name, split in before if (name, split) not in after]
    outside += [
        f"{name} ({split}): {after[name, split].value:.4f}, published {before[name, split].value:.4f} "
        f"[{low:.4f}, {high:.4f}]"
        for name, split in shared
        # Without an interval the value itself must come back.
        for low, high in [before[name, split].ci95 or (before[name, split].value,) * 2]
        if not low <= after[name, split].value <= high
    ]
    return Reproduced(finished.out, not changed, tuple(changed), tuple(outside), len(before), prepared.differences)


def _elsewhere(recorded: dict[str, Any], files: Sequence[str]) -> dict[str, str]:
    """Present paths of local files; they may have moved, but must have the recorded name."""
    paths = {}
    for item in files:
        key, _, path = item.partition("=")
        if not path or recorded.get(key) != Path(path).name:
            raise RequestError(
                f"--file {item}: is not a file of the recorded run ({key} was {recorded.get(key)!r}); "
                "give KEY=PATH, where PATH ends in the recorded name"
            )
        paths[key] = path
    return paths


def _same(published: Path, made: Path) -> bool:
    return made.is_file() and sha256_of(published) == sha256_of(made)


def _edited(results: dict[str, Any]) -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.split): m for m in read_measurements(results) if m.subject == "edited"}


def _reference(base: dict[str, Any]) -> str:
    reference = published_reference(base)
    if reference is None:
        raise RequestError(f"its base was the local model {base['name']}; give its folder with --model PATH")
    return reference
