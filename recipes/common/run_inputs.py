"""Checksums of what a run reads, so that a resumed run is known to go on with the same."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ...artifacts.checkpoints.side_files import SIDE_FILES
from ...artifacts.files.opened import sha256_of, sum_of_input
from ...artifacts.models.source import ModelSource
from ...eval.concept import Concept
from .run_folder import PLACES, RunSettings


def checksums(settings: RunSettings, models: Mapping[str, ModelSource | None], concept: Concept) -> dict[str, str]:
    """One checksum for each model, the concept pack, and each file or folder that a setting names.

    Args:
        models: By what a message may call them, such as "the base"; None where there is none.
    """
    inputs = {name: _of_model(source) for name, source in models.items() if source is not None}
    inputs["the concept pack"] = _digest(concept.sha256)
    for key in type(settings).model_fields:
        value = getattr(settings, key)
        if key not in PLACES and isinstance(value, str | Path) and str(value):
            path = Path(value)
            if path.is_file():
                inputs[f"the file of {key}"] = sha256_of(path)
            elif path.is_dir() and isinstance(value, Path):
                inputs[f"the folder of {key}"] = _of_folder(path, ["**/*"])
    return inputs


PACKAGE = Path(__file__).parents[2]


@cache
def code_digest(parts: tuple[str, ...], package: Path = PACKAGE) -> str:
    """SHA-256 of all code in some folders of the package, in sub-folders too."""
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in (package / part).rglob("*.py")):
        content = path.read_bytes()
        # Names and lengths too, so that code which moves from one file to the next is other code.
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _of_model(source: ModelSource) -> str:
    # A converted or merged file's hash and a commit name the content already; weights are read for nothing.
    return source.sha256 or source.revision or _of_folder(source.folder, ["*.safetensors", *SIDE_FILES])


def _of_folder(folder: Path, patterns: list[str]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return _digest({path.relative_to(folder).as_posix(): sum_of_input(path) for path in files})


def _digest(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
