"""What other steps of the same divergence do: the plain gradient, nothing of it made smaller."""

from typing import Any

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.edits.in_place import edits_in_place
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ...eval.inference.questions import questions_by_split
from ...eval.intervals import rate_interval
from ..common.measured_run import Job


def accuracies(job: Job, loaded: LoadedModel, edit: WeightEdit) -> dict[str, Any]:
    """Multiple choice of every split under an edit, in memory; the model is put back afterwards."""
    found = {}
    with edits_in_place(
        loaded.model, loaded.model.config.to_dict(), originals_of(job.checkpoint, loaded.model)
    ) as tries:
        tries.apply(edit)
        for split, questions in questions_by_split(job.measured, job.settings.questions).items():
            exam = MultipleChoiceSet(loaded.tokenizer, questions)
            hits = exam.hits(loaded.model)
            interval = rate_interval(hits, exam.clusters)
            found[split] = {"value": sum(hits) / len(hits), "n": len(hits), "ci95": list(interval)}
    return found
