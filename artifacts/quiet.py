"""Libraries that keep quiet for a while."""

import logging as python_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """The progress bars and notices of transformers and matplotlib are off inside; afterwards they are as they were."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Where matplotlib has never run, it says that it builds a font cache.
    fonts = python_logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            # What libraries say to their own developers.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        fonts.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
