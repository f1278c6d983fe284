"""Data sets on the Hub, read by ``datasets``, at the commit that their name resolves to."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...editing.errors import ExciseError, RequestError, nearest, one_line
from ..hub import explained

HUB = "hub:"
REF = re.compile(
    r"hub:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@]+))?(?::(?P<split>[^:@]+))?(?:@(?P<revision>[\w./-]+))?"
)
LARGE = 300_000_000
"""Bytes of a configuration from which it is streamed; a smaller one is kept in the cache of ``datasets``."""
TRIES, SECONDS = 2, 2
"""How often a stream that breaks is read again, each time with the tries of the Hub's own client, and after how long."""


@dataclass(frozen=True)
class HubSet:
    """A split of a data set at a commit."""

    name: str
    """``hub:ORG/NAME:CONFIGURATION:SPLIT@COMMIT``."""
    repo_id: str
    license: str | None
    data: Any
    """An iterable of rows."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as objects of columns.

        Raises:
            RequestError: The Hub refuses.
            ExciseError: The connection broke.
        """
        with _patient(), _told(self.name, self.repo_id):
            yield from self.data


def open_hub_set(ref: str) -> HubSet:
    """Find a data set, its configuration and its split.

    Args:
        ref: ``hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]``. Where the set has one configuration, the word after
            the id may be the split. The split is ``train`` where none is named, or the only one.

    Raises:
        RequestError: Its form is wrong, the Hub refuses or cannot be reached, or there is no such configuration or
            split.
    """
    match = REF.fullmatch(ref)
    if not match:
        raise RequestError(f"{ref} is no data set; write hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]")
    import datasets
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo_id, config, split = match["id"], match["config"], match["split"]
    with _patient(), _told(ref, repo_id):
        try:
            commit, license_, sizes = _about(repo_id, match["revision"])
        except OfflineModeIsEnabled:
            return _cached(ref, repo_id, config, split, match["revision"])
        configs = datasets.get_dataset_config_names(repo_id, revision=commit)
        if config not in (None, *configs) and split is None and len(configs) == 1:
            config, split = None, config
        config = _chosen(ref, "configuration", config, configs, "default")
        builder = datasets.load_dataset_builder(repo_id, name=config, revision=commit)
        files = builder.config.data_files or {}
        split = _chosen(ref, "split", split, [str(name) for name in builder.info.splits or files], "train")
        # Files are named hf://datasets/ORG/NAME@COMMIT/FILE.
        names = [str(file).partition(f"@{commit}/")[2] for part in files.values() for file in part]
        if sum(sizes.get(name, 0) for name in names) > LARGE:
            data = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=split)
    return HubSet(f"{HUB}{repo_id}:{config}:{split}@{commit}", repo_id, license_, data)


def _cached(ref: str, repo_id: str, config: str | None, split: str | None, revision: str | None) -> HubSet:
    """A data set that ``datasets`` has read before, at the commit that it had then.

    Raises:
        RequestError: It has not, or at another commit.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(repo_id, name=config)
        split = _chosen(ref, "split", split, [str(name) for name in builder.info.splits or ()], "train")
        data = builder.as_dataset(split=split)
    except (ConnectionError, ValueError, OSError) as error:
        raise RequestError(
            f"HF_HUB_OFFLINE is set, and the cache of `datasets` does not hold {ref}; unset it, or give a file"
        ) from error
    commit = Path(builder.cache_dir).name
    if revision not in (None, "main", commit):
        raise RequestError(
            f"HF_HUB_OFFLINE is set, and the cache holds {repo_id} at {commit}, not {revision}; unset it"
        )
    return HubSet(f"{HUB}{repo_id}:{builder.config.name}:{split}@{commit}", repo_id, builder.info.license or None, data)


def _about(repo_id: str, revision: str | None) -> tuple[str, str | None, dict[str, int]]:
    """Commit, license, and sizes of files by name."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repo_id, revision=revision, files_metadata=True)
    stated = getattr(info.card_data, "license", None) if info.card_data else None
    license_ = ", ".join(map(str, stated)) if isinstance(stated, list) else stated
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return str(info.sha), str(license_) if license_ else None, sizes


def _chosen(ref: str, what: str, named: str | None, known: Sequence[str], usual: str) -> str:
    """The one that is named, or else the only or the usual one.

    Raises:
        NoSuchPart: There is no such one, or several to choose from.
    """
    if named is None:
        named = known[0] if len(known) == 1 else usual if usual in known else None
    if named is None or named not in known:
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        fault = f"has no {what} {named}{nearest(named, list(known))}" if named else f"has several {what}s"
        raise NoSuchPart(f"{ref} {fault}; give one of {shown}, as hub:ORG/NAME:CONFIGURATION:SPLIT")
    return named


@contextmanager
def _patient() -> Iterator[None]:
    """Fewer and shorter waits for a broken stream than the library's own of minutes, and no bars of it."""
    import datasets
    from datasets import config
    from datasets.utils import logging

    names = ("STREAMING_READ", "STREAMING_OPEN")
    settings = {f"{name}_{end}": value for name in names
                for end, value in (("MAX_RETRIES", TRIES), ("RETRY_INTERVAL", SECONDS))}  # fmt: skip
    before = {name: getattr(config, name) for name in settings}
    bars, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        datasets.disable_progress_bars()
        logging.set_verbosity_error()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


class NoSuchPart(RequestError):
    """A data set without the configuration or split that was named."""


class GatedSet(RequestError):
    """A data set that its owners give to those who ask."""


@contextmanager
def _told(ref: str, repo_id: str) -> Iterator[None]:
    """What the Hub or ``datasets`` says is wrong, as one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import GatedRepoError

    try:
        with explained(ref):
            try:
                yield
            except Exception as error:
                # The library wraps what the client raises, and may leave only words of it.
                if any(isinstance(one, GatedRepoError) or "gated dataset" in str(one) for one in _causes(error)):
                    raise GatedSet(
                        f"{repo_id} is gated: ask for access at https://huggingface.co/datasets/{repo_id}, log in with"
                        " `hf auth login`, and run the same command again"
                    ) from error
                # What pyarrow says of damaged or mixed files, and the library of sets that are programs.
                if isinstance(error, ValueError) or "Dataset scripts" in str(error):
                    raise RequestError(
                        f"{ref} cannot be read ({one_line(error)}); give another set or a file"
                    ) from error
                raise
    except (DatasetsError, ImportError) as error:
        cause = next((one for one in _causes(error) if not isinstance(one, DatasetsError)), error)
        raise ExciseError(f"{ref} cannot be read ({one_line(cause)}); give another data set or a file") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
