"""Telling an error for want of memory from others (the CPU's allocator has no class of its own), and giving
back what the library keeps between steps.
"""

import torch

from ghost.algebra import release_scratch

__all__ = ["is_out_of_memory", "release_scratch"]

_SIGNS = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU's allocator or the CPU's raised this for want of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
