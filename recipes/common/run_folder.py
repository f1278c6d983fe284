"""Settings that every run has, and the folder that it writes: where it goes, and what an unfinished run holds."""

import json
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from ...artifacts.checkpoints.staging import refuse_existing
from ...editing.errors import RequestError
from .settings import Settings

T = TypeVar("T", bound="RunSettings")
WORK = ".work"


class RunSettings(Settings):
    """Settings that every recipe has."""

    model: str = "builtin:testbed"
    """Model to edit: builtin:NAME, a Hub id (revision after @), a folder, or a .gguf file."""
    concept: str = "builtin:declining"
    """Concept pack to use: builtin:NAME or a folder."""
    out: Path | None = None
    """Folder to write the run to. Default: runs/RECIPE-N, with the first free N."""
    seed: int = 0
    """Seed of every random choice. The same seed gives the same checkpoint on the same machine."""
    device: str = "auto"
    """Where to compute: cpu, cuda or cuda:N. auto takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type to compute in. auto takes bfloat16 where the hardware multiplies it natively, else float32."""

    def completed(self) -> Self:
        """The same, with what the model's own record says where nothing was set.

        Raises:
            RequestError: The record is of no help, and there is no default.
        """
        return self

    def published(self, *left_out: str) -> dict[str, Any]:
        """Settings as they may be published: of a local path the last part."""
        plain = self.model_dump(mode="json", exclude=set(left_out))
        local = {key for key in plain if isinstance(getattr(self, key), Path) or _is_local(plain[key])}
        return {key: Path(value).name if key in local else value for key, value in plain.items()}


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and Path(value).exists()


def free_folder(recipe: str) -> Path:
    """``runs/RECIPE-N`` for the first N that is free."""
    number = 1
    while Path(f"runs/{recipe}-{number}").exists():
        number += 1
    return Path(f"runs/{recipe}-{number}")


def refuse_taken(out: Path) -> None:
    """Raise unless ``out`` is free; an unfinished run there can be resumed."""
    if (out / WORK).is_dir():
        raise RequestError(f"{out} holds an unfinished run; add --resume to go on with it, or give another --out")
    refuse_existing(out)


def start_folder(out: Path, settings: RunSettings) -> Path:
    """Make a run's folder, with its settings inside, and return its working folder."""
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(settings.model_dump_json(), encoding="utf-8")
    return work


def resumed(settings: T) -> T:
    """The settings of the unfinished run in ``settings.out``; those that were set now must agree with them.

    Raises:
        RequestError: There is no unfinished run there, or it has other settings.
    """
    if settings.out is None:
        raise RequestError("--resume needs the folder of the run to go on with; give --out")
    path = settings.out / WORK / "settings.json"
    if not path.exists():
        raise RequestError(f"{settings.out} holds no unfinished run; leave out --resume to start one")
    stored = type(settings).model_validate(json.loads(path.read_text(encoding="utf-8")))
    # Only what was set now is compared; what was left out is taken from the stored settings.
    different = [key for key in settings.model_fields_set - {"out"} if getattr(settings, key) != getattr(stored, key)]
    if different:
        raise RequestError(
            f"the run in {settings.out} was started with other values of {', '.join(different)}; "
            "leave them out, or start a new run"
        )
    return stored.model_copy(update={"out": settings.out})
