"""What every call from Python shares: progress for whoever watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ...artifacts.events import Events, Watcher, waited_for
from ...artifacts.quiet import quiet_libraries


def events_for(progress: bool) -> Events:
    """Events that are shown on the terminal, if there is one and progress is wanted."""
    return Events(watcher=_terminal() if _is_shown(progress) else None)


@contextmanager
def called(progress: bool) -> Iterator[None]:
    """Libraries are quiet, and what takes long before a run's first stage is shown, if progress is wanted."""
    with quiet_libraries(), waited_for(_terminal if _is_shown(progress) else None):
        yield


def _is_shown(progress: bool) -> bool:
    return progress and sys.stderr.isatty()


def _terminal() -> Watcher:
    from ...artifacts.progress import Terminal

    return Terminal()
