"""The edit that a run learned, kept in its working folder so that a run which was killed does not learn it again."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ...artifacts.checkpoints.edits import load_edit, save_edit
from ...artifacts.files.opened import Telling
from ...artifacts.files.written import SEAL, check_sealed, files_in, seal_files
from ...editing.edits.base import WeightEdit
from ...editing.errors import RequestError
from .measured_job import Job
from .run_folder import start_folder
from .run_inputs import checksums

LEARNED = "edit"
"""In the working folder: the edit, once it is learned."""


def start(job: Job) -> Path:
    """The run's working folder, with the request and the checksums of its inputs inside.

    Raises:
        RequestError: An unfinished run there was begun otherwise, or what it left was changed.
    """
    models = {"the base": job.source, "the reference": job.reference, **job.read}
    work = start_folder(job.out, job.recipe, job.settings, checksums(job.settings, models, job.concept))
    if (work / LEARNED).exists():
        # Said now, not after the base was measured.
        _check_untouched(work)
    return work


def learned_edit(work: Path, learn: Callable[[], WeightEdit], beside: Sequence[str] = ()) -> WeightEdit:
    """The edit that an interrupted run left in its working folder; or a newly learned one, stored there.

    Args:
        beside: Files and folders of the working folder that ``learn`` writes, and a resumed run reads.

    Raises:
        RequestError: What the interrupted run left is no longer what it wrote.
    """
    folder = work / LEARNED
    if folder.exists():
        _check_untouched(work)
        return load_edit(folder)
    edit = learn()
    # Renamed when it is whole: a resumed run must not take half an edit for one that was learned.
    partial = work / "edit.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_edit(edit, partial)
    files = files_in(partial, f"{LEARNED}/")
    for name in beside:
        files |= files_in(work / name, f"{name}/") if (work / name).is_dir() else {}
        files |= {name: work / name} if (work / name).is_file() else {}
    seal_files(partial / SEAL, files)
    partial.rename(folder)
    return edit


def _check_untouched(work: Path) -> None:
    out, seal = work.parent, work / LEARNED / SEAL
    with Telling(RequestError, f"the run cannot go on; remove {out} and start it again").about(seal):
        gone, changed = check_sealed(seal, work)
    if gone or changed:
        name, what = (gone[0], "is gone") if gone else (changed[0], "was changed")
        raise RequestError(
            f"{work / name} {what} since the run wrote it, so what was learned is lost; remove {out} and start the run"
            " again"
        )
