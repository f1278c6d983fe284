"""The folder for converted models and for tensors that can be computed again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/excise``, or ``~/.cache/excise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excise"
