"""Models by reference: built in, on the Hub, in a folder, in a GGUF file, or as an adapter of one of these.

Each becomes a safetensors folder.
"""

from pathlib import Path

from ...editing.errors import CheckpointError, RequestError, nearest
from ..checkpoints.adapter_config import is_adapter
from ..checkpoints.manifest import checkpoint_of
from .adapter import PreparedMerge, merged, prepare_merge
from .dequantized import in_full_precision
from .gguf import from_gguf
from .hub import HUB_ID, from_hub
from .outline import whole_models
from .source import BUILTIN, ModelSource, builtin_models


def find_model(ref: str, base: str | None = None, *, to_edit: bool = False) -> ModelSource:
    """Resolve a reference to a local folder. A Hub model is downloaded once, and a GGUF file converted once.

    A run's folder stands for the checkpoint in it. Weights in fp8, MXFP4 or a format of compressed-tensors are
    dequantized once. A PEFT adapter is merged into its base once.

    Args:
        ref: The model.
        base: The base of an adapter; by default the one that the adapter names. Other models have no use for it.
        to_edit: Refuse a model that cannot be edited before its weights are fetched from the Hub, or converted.

    Raises:
        RequestError: There is no such model, or the Hub cannot be reached.
        CheckpointError: The file is a pickle, or not a model.

    Example:
        >>> find_model("org/name@main").folder
    """
    source = _located(ref, to_edit=to_edit)
    if is_adapter(source.folder):
        # The merged model goes into the cache, so outlines will not do.
        with whole_models():
            return merged(source, base, _whole)
    return in_full_precision(source)


def find_adapter(ref: str) -> ModelSource | None:
    """The folder of a PEFT adapter, which is not merged; None where the reference is of a whole model or of nothing.

    Raises:
        RequestError: The Hub cannot be reached.
    """
    local = Path(ref).exists() or ref.startswith((".", "/")) or "/" not in ref or not HUB_ID.fullmatch(ref)
    if local and not is_adapter(Path(ref)):
        return None
    source = _located(ref)
    return source if is_adapter(source.folder) else None


def prepare_adapter(source: ModelSource, base: str | None) -> PreparedMerge:
    """An adapter and its base, checked to fit together before a weight of the base is read.

    Raises:
        RequestError: There is no such base, or the adapter does not fit it.
        CheckpointError: The adapter or the base is damaged.
    """
    return prepare_merge(source, base, _whole)


def _whole(ref: str) -> ModelSource:
    """A model that is no adapter, as a base must be."""
    return in_full_precision(_located(ref))


def _located(ref: str, *, to_edit: bool = False) -> ModelSource:
    path = Path(ref)
    if ref.startswith("builtin:"):
        name = ref.removeprefix("builtin:")
        if name not in builtin_models():
            known = ", ".join(f"builtin:{model}" for model in builtin_models())
            raise RequestError(f"no built-in model {name!r}{nearest(name, builtin_models())}; models: {known}")
        return ModelSource("builtin", ref, BUILTIN / name)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{path.name} is a pickle, which can run code when loaded; convert it on a machine without private data: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)"
        )
    if path.is_dir():
        path = checkpoint_of(path)
        folder = path.resolve()
        # Every run's model folder is called checkpoint, so the run's name is added.
        name = f"{folder.parent.name}/{folder.name}" if folder.name == "checkpoint" else folder.name
        return ModelSource("local", name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RequestError(
                f"there is no file {ref}; give a .gguf file, a model folder, a Hub id or builtin:testbed"
            )
        return from_gguf(path, to_edit=to_edit)
    match = HUB_ID.fullmatch(ref)
    if path.exists() or not match or ref.startswith((".", "/")):
        raise RequestError(
            f"{ref} is no model folder; give a folder, a .gguf file, a Hub id such as org/name or builtin:testbed"
        )
    return from_hub(match["id"], match["revision"], to_edit=to_edit)
