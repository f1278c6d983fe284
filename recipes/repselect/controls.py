"""What other steps of the same divergence do: the plain gradient, nothing of it made smaller."""

from typing import Any

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.edits.in_place import edits_in_place
from ...eval.inference import multiple_choice_set
from ..common.measured_run import Job


def accuracies(job: Job, loaded: LoadedModel, edit: WeightEdit) -> dict[str, Any]:
    """Multiple choice of every split under an edit, in memory; the model is put back afterwards."""
    with edits_in_place(
        loaded.model, loaded.model.config.to_dict(), originals_of(job.checkpoint, loaded.model)
    ) as tries:
        tries.apply(edit)
        return multiple_choice_set.accuracies(loaded.model, loaded.tokenizer, job.measured, job.settings.questions)
