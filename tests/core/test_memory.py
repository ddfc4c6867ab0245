"""What counts as running out of memory, and the way back."""

import pytest
import torch

from handful.core.memory import in_smaller_parts, is_out_of_memory


def test_every_allocators_words_count_and_other_errors_do_not():
    short = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Invalid buffer size: 24.00 GB"),
    ]
    with pytest.raises(RuntimeError) as real:  # what the CPU's own allocator says here
        torch.empty(1 << 58)
    assert all(map(is_out_of_memory, [*short, real.value]))
    others = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]
    assert not any(map(is_out_of_memory, others))


def test_the_same_work_is_tried_with_half_as_many_until_it_fits():
    tried, told = [], []

    def call(size: int) -> int:
        tried.append(size)
        if size > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")
        return size

    assert in_smaller_parts(call, 9, lambda before, now: told.append((before, now))) == 2
    assert (tried, told) == ([9, 5, 3, 2], [(9, 5), (5, 3), (3, 2)])
    for error in (RuntimeError("DefaultCPUAllocator: not enough memory"), ValueError("something else")):
        with pytest.raises(type(error)):
            in_smaller_parts(lambda size, e=error: (_ for _ in ()).throw(e), 1)
