"""Make a published checkpoint again from what it says of itself, and see whether the same comes out."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.checkpoints.manifest import package_versions, platform_of, read_manifest, sha256_of, verify_folder
from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.models.find import find_model
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
    """What the recipe prepared."""
    out: Path
    differences: tuple[str, ...]
    """What is not as it was when it was made: packages, platform."""


@dataclass(frozen=True)
class Reproduced:
    """How the new checkpoint compares with the published one."""

    out: Path
    identical: bool
    """All weights have the same SHA-256."""
    changed_files: tuple[str, ...]
    outside: tuple[str, ...]
    """Measurements whose new value lies outside the published interval or is not there, in words."""
    compared: int
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """The same weights; on another platform, measurements within their intervals."""
        return self.identical or (bool(self.differences) and not self.outside)


def prepare(
    folder: Path, out: Path, *, model: str | None = None, concept: str | None = None, files: Sequence[str] = ()
) -> ReproduceJob:
    """Read what was recorded, and check that base and concept are the same ones.

    Args:
        model: Where the base is, if it was a local one.
        concept: Where the concept pack is, if it was a local one.
        files: ``KEY=PATH`` for each other setting that named a local file, of which the record has the name alone.

    Raises:
        RequestError: There is no record, or base, concept or a file is another.
        VerifyError: The folder is not as it was published.
    """
    refuse_taken(out)
    verify_folder(folder)
    if not (folder / RESULTS).is_file():
        raise RequestError(
            f"{folder} holds no {RESULTS}, so nothing says how it was made; apply its edit with `excise apply`"
        )
    published = read_json(folder / RESULTS)
    manifest = read_manifest(folder)
    assert manifest is not None, "verified above"
    base, run, name = published["base"], published["run"], published["run"]["recipe"]
    if name not in RECIPES:
        raise RequestError(
            f"it was made by the recipe {name}, which this excise does not have; recipes: {', '.join(RECIPES)}"
        )
    reference = model or _reference(base)
    source = find_model(reference)
    hashes = {shard.path.name: sha256_of(shard.path) for shard in open_checkpoint(source.folder).shards}
    if hashes != manifest["base"]["files"]:
        raise RequestError(
            f"{source.name} is not the base it was made from ({base['name']}): its weights differ; give it with --model"
        )
    wanted = published["concept"]
    pack = load_concept(concept or wanted["ref"]) if concept or wanted["ref"].startswith("builtin:") else None
    if pack is None:
        raise RequestError(f"the concept {wanted['ref']} was a local pack; say where it is with --concept DIR")
    if pack.sha256 != wanted["sha256"]:
        raise RequestError(f"{pack.ref} is not the concept pack it was made with; its files differ")
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
    """Run the recipe again and compare."""
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
        f"[{before[name, split].ci95[0]:.4f}, {before[name, split].ci95[1]:.4f}]"
        for name, split in shared
        if not before[name, split].ci95[0] <= after[name, split].value <= before[name, split].ci95[1]
    ]
    return Reproduced(finished.out, not changed, tuple(changed), tuple(outside), len(before), prepared.differences)


def _elsewhere(recorded: dict[str, Any], files: Sequence[str]) -> dict[str, str]:
    """Where local files are now; they may stand elsewhere, but under the name that was recorded."""
    found = {}
    for given in files:
        key, _, path = given.partition("=")
        if not path or recorded.get(key) != Path(path).name:
            raise RequestError(
                f"--file {given}: gives no file that the run was made with ({key} was {recorded.get(key)!r}); "
                "give KEY=PATH, ending in the name that was recorded"
            )
        found[key] = path
    return found


def _same(published: Path, made: Path) -> bool:
    return made.is_file() and sha256_of(published) == sha256_of(made)


def _edited(results: dict[str, Any]) -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.split): m for m in read_measurements(results) if m.subject == "edited"}


def _reference(base: dict[str, Any]) -> str:
    if base["kind"] in ("local", "gguf"):
        raise RequestError(f"its base was the local {base['name']}; say where it is with --model PATH")
    return f"{base['name']}@{base['revision']}" if base["revision"] else str(base["name"])
