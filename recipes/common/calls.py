"""What every call from Python shares: libraries that keep quiet, and progress for whoever watches."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ...artifacts.events import Events


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """The progress bars and notices of transformers are off inside; afterwards they are as they were."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # What libraries say to their own developers.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def events_for(progress: bool) -> Events:
    """Events that are shown on the terminal, if there is one and progress is wanted."""
    if not progress or not sys.stderr.isatty():
        return Events()
    from ...artifacts.progress import Terminal

    return Events(watcher=Terminal())
