"""What a run was about, from the record beside the model that it made."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ...artifacts.checkpoints.manifest import check_unchanged, checkpoint_of
from ...artifacts.files.forms import Form
from ...artifacts.models.find import find_adapter, find_model
from ...artifacts.reporting.outcomes import published_reference
from ...artifacts.reporting.results import RESULTS
from ...artifacts.upgrade import ConceptRecord, ModelRecord, read_json
from ...editing.errors import RequestError
from .prompt_settings import PromptSettings


class _Record(Form):
    base: ModelRecord
    concept: ConceptRecord


@dataclass(frozen=True)
class RunInputs:
    """References to a run's inputs; None where a name would be a place on the machine where the run was made."""

    model: str
    concept: str | None
    base: str | None
    reference: str | None
    names: dict[str, str]
    """What the record calls concept and base."""
    prompts: dict[str, Any]
    """Settings of how the run rendered its prompts."""

    def known(self, key: str, option: str = "") -> str:
        """The concept or the base.

        Args:
            option: What a command calls it, where that is another word.

        Raises:
            RequestError: It was a local file or folder, which is not recorded.
        """
        value: str | None = getattr(self, key)
        if value is None:
            raise RequestError(
                f"the {key} of {self.model} was a local file or folder, {self.names[key]}; give its path with"
                f" --{option or key}"
            )
        return value


def inputs_of(model: str) -> RunInputs | None:
    """The inputs of the run that made a model; None where nothing says that a run made it.

    Raises:
        RequestError: The record is damaged, or was changed since.
    """
    if find_adapter(model):
        return None
    record = checkpoint_of(find_model(model).folder) / RESULTS
    if not record.is_file():
        return None
    check_unchanged(record.parents[1], [RESULTS])
    results = read_json(record, _Record)
    concept, reference = str(results["concept"]["ref"]), results.get("reference")
    return RunInputs(
        model,
        concept if concept.startswith("builtin:") else None,
        published_reference(results["base"]),
        published_reference(reference) if reference else None,
        {"concept": concept, "base": str(results["base"]["name"])},
        {key: value for key, value in results.get("prompts", {}).items() if key in PromptSettings.model_fields},
    )


def of_its_run(settings: BaseModel, model: str) -> dict[str, str]:
    """Base and concept from the record of the run that made a model, by setting, where these were not given.

    Raises:
        RequestError: One of them was a local folder, which is not recorded.
    """
    unset = {"model", "concept"} - settings.model_fields_set
    run = inputs_of(model) if unset else None
    return {} if run is None else {key: run.known("base" if key == "model" else key, key) for key in sorted(unset)}
