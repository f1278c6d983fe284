"""States that a killed training goes on from: which of them is the newest whole one."""

import shutil
from pathlib import Path

from ...artifacts.files.opened import Telling, Unreadable
from ...artifacts.files.written import SEAL, check_sealed
from ...editing.errors import RequestError

LAST_GOOD = "last-good"
CHECKPOINT = "checkpoint-"
SHARDED_STATE = "pytorch_model_fsdp_0"
"""In the state of a sharded model: the library's name of its weights."""


def last_complete(folder: Path, steps: int, *, sharded: bool = False) -> str | None:
    """The newest whole checkpoint; those that a kill left half-written or half-removed are deleted.

    Raises:
        RequestError: A checkpoint was changed since it was written, is of a longer training, or was written by as many
            processes as cannot read it now.
    """
    whole = []
    for checkpoint in folder.glob(f"{CHECKPOINT}*"):
        step = _step_of(checkpoint)
        if step is None:
            shutil.rmtree(checkpoint)
        elif step > steps:
            raise RequestError(f"{checkpoint} is the state of step {step} of {steps}; {_AGAIN}")
        elif (checkpoint / SHARDED_STATE).exists() != sharded:
            before = "several processes that shared it" if not sharded else "one process"
            raise RequestError(
                f"the training in {folder.parent.parent} was begun by {before}; go on with it as it was begun"
            )
        else:
            whole.append((step, str(checkpoint)))
    return max(whole)[1] if whole else None


_AGAIN = "it is no state of this training, so remove the run's folder and start the run again"


def _step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint was written after; None if it is not whole."""
    if not (checkpoint / SEAL).exists():
        return None
    with Telling(RequestError, _AGAIN).about(checkpoint):
        gone, changed = check_sealed(checkpoint / SEAL, checkpoint.parent)
        if changed:
            raise Unreadable(f"{changed[0]} was changed since it was written")
    # Old checkpoints are removed file by file.
    return None if gone else int(checkpoint.name.removeprefix(CHECKPOINT))
