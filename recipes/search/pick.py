"""An ordinary run of a trial's settings, measured on the half of the items that the search never asked."""

from pathlib import Path
from typing import Any

from ...editing.errors import RequestError
from .request import check_optuna, recorded
from .study import Study


def settings_of_trial(folder: Path, number: int, storage: str | None = None) -> tuple[str, dict[str, Any]]:
    """The recipe and the settings of a complete trial, as ``excise run`` takes them.

    Raises:
        RequestError: There is no such trial, or it was left early.
    """
    check_optuna()
    request = recorded(folder, storage)
    study = Study.of(request)
    done = study.done()
    found = {one.number: one for one in done}
    if number not in found or found[number].state != "complete":
        best = ", ".join(str(one.number) for one in study.front(done)) or "none yet"
        why = f"was {found[number].state}" if number in found else "is not there"
        raise RequestError(f"trial {number} of {folder} {why}; of the front: {best}")
    settings = request.base.model_dump(mode="json", exclude_unset=True, exclude={"out", "items", *request.left_out})
    settings |= dict(found[number].settings) | {"items": "report", "chosen_from": len(done)}
    return request.recipe, settings
