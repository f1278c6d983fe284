"""Ask base and edited model the same things: one prompt, a reply from each."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifacts.checkpoints.manifest import checkpoint_of, read_manifest
from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.events import Events
from ..artifacts.models.dequantized import check_loadable
from ..artifacts.models.find import find_model
from ..artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model
from ..artifacts.models.source import ModelSource
from ..artifacts.reporting.outcomes import published_reference
from ..editing.errors import RequestError
from ..eval.inference.generation import generate


@dataclass(frozen=True)
class ChatJob:
    """A checked request."""

    sources: dict[str, ModelSource]
    """By what the terminal calls them: base and edited, or model where there is no base."""
    device: torch.device
    dtype: torch.dtype


def prepare(model: str, base: str | None, *, alone: bool = False, device: str = "auto", dtype: str = "auto") -> ChatJob:
    """Find the model, and the base that its manifest names unless another one is given.

    Args:
        model: Any model, or the folder of a run.
        base: The model it was made from.
        alone: Talk to the model alone.

    Raises:
        RequestError: Anything that could not work, before a weight is read.
    """
    source = find_model(model, base)
    sources = {"model": source} if alone else _with_base(source, base)
    chosen = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen)
    for one in sources.values():
        check_loadable(open_checkpoint(one.folder), chosen, chosen_dtype)
    return ChatJob(sources, chosen, chosen_dtype)


def _with_base(source: ModelSource, base: str | None) -> dict[str, ModelSource]:
    if source.base is not None:
        return {"base": source.base, "edited": source}
    before = base or recorded_base(source.folder)
    return {"base": find_model(before), "edited": source} if before else {"model": source}


def recorded_base(folder: Path) -> str | None:
    """Reference of the base that a run's folder or checkpoint names; None where excise did not make it.

    Raises:
        RequestError: The base was a local folder, of which only the name is recorded.
    """
    manifest = read_manifest(checkpoint_of(folder))
    if manifest is None:
        return None
    base = manifest["base"]
    reference = published_reference(base)
    if reference is None:
        raise RequestError(
            f"the base of {folder} was the local model {base['name']}; give its folder with --base, or add --no-base"
        )
    return reference


def load(job: ChatJob, events: Events) -> dict[str, LoadedModel]:
    """Load every model of the conversation."""
    loaded = {}
    for name, source in job.sources.items():
        with events.stage(f"load {name}"):
            loaded[name] = load_model(source, job.device, job.dtype)
    return loaded


def replies(
    models: dict[str, LoadedModel], prompt: str, max_new_tokens: int, sample_seed: int | None = None
) -> dict[str, str]:
    """What each model answers: greedily, or sampled with a seed. Earlier prompts are not shown to it."""
    return {
        name: generate(one.model, one.tokenizer, [prompt], max_new_tokens, sample_seed=sample_seed)[0].shown
        for name, one in models.items()
    }
