"""Out of memory: recognised on any device, and answered by doing the same work in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
# How the allocators without an error class of their own say it: the CPU's, MPS, XPU, C++'s, cuBLAS and cuDNN.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
    "failed to allocate",
    "invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of whatever device it was."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def in_smaller_parts(call: Callable[[int], Result], size: int, report: Callable[[int, int], None] | None = None) -> Result:
    """`call(size)`, the whole work in parts of at most `size` images; again with half as many for as long as memory is short.

    Args:
        report: Called with the number of images that was too many, and the number that is tried next.
    """
    while True:
        try:
            return call(size)
        except Exception as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        # outside of `except`, where the error still holds the tensors of the failed try
        if report is not None:
            report(size, (size + 1) // 2)
        size = (size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
