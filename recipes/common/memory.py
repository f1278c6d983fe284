"""How a process that holds a model gets its memory."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
LARGEST = 64 << 20
"""Bytes of a tensor whose memory is used again; larger ones are returned to the system when they are freed."""
SPARE = 256 << 20
"""Most bytes that stay free for the next tensors."""


def keep_freed_memory() -> bool:
    """Use the memory of freed tensors again, where the C library lets itself be told to: it is not returned to the
    system.

    Logits and activations are a few dozen megabytes and live for milliseconds. By default each is mapped afresh, page
    by page. This is for a whole process and not undone.

    Returns:
        Whether it was done; elsewhere everything works as before, a little slower.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, SPARE))
