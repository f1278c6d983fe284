"""The command that makes an audit again."""

import os
import shlex
from pathlib import Path

from ...artifacts.models.source import ModelSource
from .request import AuditJob


def command(job: AuditJob, *, public: bool = False) -> str:
    """The command in one line, ready to be pasted where the audit was run.

    Args:
        public: Name models as they are published instead of by the paths that the user typed.
    """
    settings = job.settings
    typed = {"edited": settings.model, "base": settings.base, "reference": settings.reference}
    names = {
        subject: source.address if public else pasted(source, typed[subject] or source.name)
        for subject, source in job.sources.items()
    }
    # A path may show the names of folders on this machine, so what is published names the pack alone.
    concept = (None if public else relative(settings.concept)) or job.concept.ref
    words = ["excise", "audit", names["edited"], "--concept", concept, "--base", names["base"]]
    if "reference" in names:
        words += ["--reference", names["reference"]]
    words += ["--budget", settings.budget, "--seed", str(settings.seed)]
    if settings.attacks:
        words += ["--attacks", ",".join(settings.attacks)]
    if settings.questions:
        words += ["--questions", str(settings.questions)]
    if settings.dtype != "auto":
        words += ["--dtype", settings.dtype]
    for name in ("locked", "removed"):
        if (wanted := getattr(settings, name)) is not None:
            words += ["--set", f"{name}={str(wanted).lower()}"]
    return shlex.join(words)


def pasted(source: ModelSource, typed: str) -> str:
    """A model as the user may name it again: a path relative to where the command ran; others at their commit."""
    local = source.kind in ("local", "gguf", "adapter") and Path(typed).exists()
    return (relative(typed) if local else None) or source.address


def relative(path: str) -> str | None:
    """A path from the working directory; None where that would say where it lies on this machine.

    From outside of the home folder, or into another one, the way leads through folders whose names may be private.
    """
    if not Path(path).is_absolute():
        return path
    here = Path.cwd()
    shared = any(Path(path).is_relative_to(folder) and here.is_relative_to(folder) for folder in (here, Path.home()))
    return os.path.relpath(path, here) if shared else None
