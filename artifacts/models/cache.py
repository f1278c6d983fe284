"""Where converted models and tensors that can be computed again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excise"
