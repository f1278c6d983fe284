"""Memory that ran out: how it is told from other errors, and how what is left of the attempt is given back."""

import gc

import torch

FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: not enough memory")
"""Words of errors that accelerate does not count; the second is Windows'."""


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left for a tensor."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in FAILED)


def give_back() -> None:
    """Free what nobody uses any more, so that a smaller attempt finds room; call it outside the handler of the error."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
