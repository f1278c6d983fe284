"""What every call from Python shares: progress for whoever watches."""

import sys

from ...artifacts.events import Events


def events_for(progress: bool) -> Events:
    """Events that are shown on the terminal, if there is one and progress is wanted."""
    if not progress or not sys.stderr.isatty():
        return Events()
    from ...artifacts.progress import Terminal

    return Events(watcher=Terminal())
