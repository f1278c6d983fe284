"""Models on the Hugging Face Hub, pinned to a commit."""

import re
from pathlib import Path

from ...editing.errors import CheckpointError, RequestError
from .source import ModelSource

WANTED = [
    # It names the licence.
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
]


_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


def config_from_hub(ref: str) -> Path:
    """The ``config.json`` of a Hub model, and nothing else of it.

    Raises:
        RequestError: It is no Hub id, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    match = _ID.fullmatch(ref)
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
        status = error.response.status_code if error.response is not None else "no answer"
        raise RequestError(
            f"the Hub refused {ref} ({status}); check the name and revision, and log in with `hf auth login` if the "
            "model is private or gated"
        ) from error


def from_hub(repo_id: str, revision: str | None) -> ModelSource:
    """Download a model at a revision (default: the main branch) and pin it to the commit.

    Raises:
        RequestError: The Hub refuses or cannot be reached, and its cache does not hold the model.
        CheckpointError: The cached folder is not named by a commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Resolves the revision to a commit first; without a connection it takes the cached snapshot of that revision.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=WANTED))
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"{repo_id} is no local folder, the Hub cannot be reached, and the Hub's cache does not hold the model; "
            "check the name, go online, or give a model folder, a .gguf file or builtin:testbed"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise RequestError(
            f"the Hub refused {repo_id}{'@' + revision if revision else ''} ({status}); check the name and revision, "
            "and log in with `hf auth login` if the model is private or gated"
        ) from error
    # The client names snapshots by commit; another name would be published as a revision that nobody can fetch.
    if not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        raise CheckpointError(
            f"the Hub's cache holds {repo_id} under {folder.name}, which is not a commit; clear the cache"
        )
    return ModelSource("hub", repo_id, folder, revision=folder.name)
