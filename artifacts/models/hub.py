"""Models on the Hugging Face Hub, pinned to a commit: configuration and headers first, then the weights, once."""

import fnmatch
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...editing.architectures import architecture_of, layer_count
from ...editing.edits.subspace_removal import ties_embeddings
from ...editing.errors import CheckpointError, RequestError
from ...editing.wiring.row import classify, spelled
from ..checkpoints.proof import check_proved
from ..checkpoints.quantized import FORMATS, method_of, quantization_of
from ..checkpoints.read import EDITABLE, INDEX, SINGLE
from ..checkpoints.side_files import SIDE_FILES
from ..files.opened import OF_A_CHECKPOINT
from ..files.parsed import read_object
from ..hub import is_connection_error, literal
from .outline import outline, place_of_outlines
from .source import ModelSource

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)
CARD = "README.md"
"""It names the licence."""


HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


def config_from_hub(ref: str) -> Path:
    """The ``config.json`` of a Hub model, and nothing else of it.

    Raises:
        RequestError: It is no Hub id, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    match = HUB_ID.fullmatch(ref)
    if not match:
        raise RequestError(f"{ref} is no model folder and no Hub id; give a folder, a config.json, or org/name")
    try:
        return Path(hf_hub_download(match["id"], "config.json", revision=match["revision"]))
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"{ref} is no local folder, the Hub cannot be reached, and the Hub's cache does not hold its config.json; "
            "check the name, go online, or give a model folder or a config.json"
        ) from error
    except EntryNotFoundError as error:
        raise RequestError(f"{ref} has no config.json on the Hub; give a model in the transformers format") from error
    except HfHubHTTPError as error:
        raise _refused(ref, error) from error


def _refused(ref: str, error: "HfHubHTTPError") -> RequestError:
    status = error.response.status_code if error.response is not None else "no answer"
    return RequestError(
        f"the Hub refused {ref} ({status}); check the name and revision, and log in with `hf auth login` if the "
        "model is private or gated"
    )


def from_hub(repo_id: str, revision: str | None, *, to_edit: bool = False) -> ModelSource:
    """Download a model at a revision (default: the main branch) and pin it to the commit.

    Args:
        to_edit: Refuse a model that cannot be edited before its weights are fetched.

    Raises:
        RequestError: The Hub refuses or cannot be reached, and its cache does not hold the model; or it cannot be
            edited.
        CheckpointError: The repository holds no model that can be read, or two.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = _fetched(repo_id, revision, to_edit)
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"{repo_id} is no local folder, the Hub cannot be reached, and the Hub's cache does not hold the model; "
            "check the name, go online, or give a model folder, a .gguf file or builtin:testbed"
        ) from error
    except HfHubHTTPError as error:
        raise _refused(f"{repo_id}@{revision}" if revision else repo_id, error) from error
    # The client names snapshots by commit; another name would be published as a revision that nobody can fetch.
    if not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        raise CheckpointError(
            f"the Hub's cache holds {repo_id} under {folder.name}, which is not a commit; clear the cache"
        )
    return ModelSource("hub", repo_id, folder, revision=folder.name)


def side_names(names: Collection[str]) -> list[str]:
    """Of a repository's files, those beside the weights that a model needs: no code, and no second copy in a folder."""
    patterns = (CARD, INDEX, *SIDE_FILES)
    return sorted(
        name
        for name in names
        # fnmatch lets * stand for slashes too.
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
        and (name == INDEX or not name.endswith(".index.json"))
    )


def weight_names(names: Collection[str], index: dict[str, Any] | None, repo_id: str) -> list[str]:
    """The files of weights that belong to the model: those of the index, or the single one.

    Raises:
        CheckpointError: There are none in safetensors, or those of two models.
    """
    if index is None and SINGLE not in names:
        held = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        also = f"; it holds {held[0]}" if held else ""
        raise CheckpointError(
            f"{repo_id} holds neither {SINGLE} nor {INDEX}{also}; give a repository with safetensors weights, or a file"
            " of it that you fetched"
        )
    listed = index.get("weight_map") if index is not None else {"": SINGLE}
    files = sorted(set(listed.values())) if isinstance(listed, dict) and all(map(_is_text, listed.values())) else []
    missing = [name for name in files if name not in names]
    if not files or missing:
        told = f"names {missing[0]}, which is not there" if missing else "names no files"
        raise CheckpointError(f"the {INDEX} of {repo_id} {told}; tell its owner, or give another revision")
    if SINGLE in names and SINGLE not in files:
        raise CheckpointError(
            f"{repo_id} holds the weights of two models: {SINGLE} is there and {INDEX} names {files[0]}; programs differ"
            " in which they load, so give another revision, or fetch one of them into a folder"
        )
    return files


def _fetched(repo_id: str, revision: str | None, to_edit: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # the client's HTTP library differs between its versions
        if not (isinstance(error, HfHubHTTPError | OSError) or is_connection_error(error)):
            raise
        return _from_cache(repo_id, revision, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    side = side_names(sizes)
    # By its name, which the cache then knows for later runs without a connection; it may have moved since.
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[literal(name) for name in side]))
    if folder.name != info.sha:
        raise RequestError(f"{repo_id} was changed while it was fetched; run the same command again")
    index = None
    if INDEX in side:
        with OF_A_CHECKPOINT.about(f"{INDEX} of {repo_id}"):
            index = read_object(folder / INDEX)
    is_adapter = "adapter_config.json" in sizes and index is None and SINGLE not in sizes
    files = ["adapter_model.safetensors"] if is_adapter else weight_names(sizes, index, repo_id)
    if new := [name for name in files if not (folder / name).exists()]:
        if to_edit and not is_adapter:
            _check_editable(api, repo_id, folder, index, files)
        place = place_of_outlines()
        if (
            place is not None
            and not is_adapter
            and _outline_is_enough(api, repo_id, folder, index, files, to_edit=to_edit)
        ):
            return outline(api, repo_id, folder, files, sizes, place)
        log.info("fetching %.2f GB of weights of %s", sum(sizes[name] for name in new if name in sizes) / 1e9, repo_id)
        snapshot_download(repo_id, revision=folder.name, allow_patterns=[literal(name) for name in [*side, *files]])
    return folder


def _from_cache(repo_id: str, revision: str | None, error: Exception) -> Path:
    """What an earlier command fetched, where the Hub cannot be asked.

    Raises:
        RequestError: It is not whole.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except OSError as absent:
        raise (error if isinstance(error, HfHubHTTPError) else absent) from None
    if not any(folder.glob("*.safetensors")):
        raise RequestError(
            f"the Hub cannot be reached, and its cache holds {repo_id} without its weights, as a dry run leaves it; go"
            " online"
        ) from error
    return folder


def _check_editable(api: Any, repo_id: str, folder: Path, index: dict[str, Any] | None, files: list[str]) -> None:
    """Check what a few kilobytes tell: the architecture, the tensors' names, and the types in the first file.

    Raises:
        RequestError: The model cannot be edited.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{repo_id} has no {path.name}; give a model in the transformers format")
    with OF_A_CHECKPOINT.about(f"{path.name} of {repo_id}"):
        config = read_object(path)
    if (about := quantization_of(config)) is not None and method_of(about) in FORMATS:
        # Such weights are dequantized once they are here, and stand under other names until then.
        check_proved({key: value for key, value in config.items() if key != "quantization_config"})
        return
    check_proved(config)
    row = architecture_of(config)
    header = api.parse_safetensors_file_metadata(repo_id, files[0], revision=folder.name)
    types = {name: tensor.dtype for name, tensor in header.tensors.items()}
    for site in classify(row, list(types if index is None else index["weight_map"]), layer_count(config)):
        if types.get(site.name, EDITABLE[0]) not in EDITABLE:
            raise CheckpointError(
                f"{site.name} of {repo_id} is stored as {types[site.name]}, which cannot be edited; edit a checkpoint in"
                f" {', '.join(EDITABLE)}, then quantize"
            )


def _outline_is_enough(
    api: Any, repo_id: str, folder: Path, index: dict[str, Any] | None, files: list[str], *, to_edit: bool
) -> bool:
    """Whether the weights' headers say all that a plan needs."""
    path = folder / "config.json"
    if not path.is_file():
        return True
    with OF_A_CHECKPOINT.about(f"{path.name} of {repo_id}"):
        config = read_object(path)
    if quantization_of(config) is not None:
        # Such weights are dequantized into the cache.
        return False
    if not to_edit or not ties_embeddings(config):
        return True
    # Whether a second copy of the embedding is the same one, its numbers say.
    row = architecture_of(config)
    names = (
        index["weight_map"]
        if index
        else api.parse_safetensors_file_metadata(repo_id, files[0], revision=folder.name).tensors
    )
    return spelled(row, row.unembedding, names) is None and "lm_head.weight" not in names


def _is_text(value: object) -> bool:
    return isinstance(value, str)
