"""Memory that is filled with one number."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Fill(NamedTuple):
    """So many numbers of memory that is to become 0."""

    ptr: Any
    size: int


@triton.jit
def fill(ptr, value, count, program, programs, BLOCK: tl.constexpr):
    """Some programs together set ``count`` numbers, which nobody waits for."""
    start = program.to(tl.int64) * BLOCK
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        tl.store(ptr + offs, tl.full((BLOCK,), value, ptr.dtype.element_ty), mask=offs < count)
        start += programs * BLOCK


@triton.jit
def fill_by_last(zeros, part, PARTS: tl.constexpr, FILLING: tl.constexpr):
    """Have the last parts of all rows fill memory: few rows have so many."""
    first: tl.constexpr = PARTS - FILLING
    if part >= first:
        nth = (part - first) * tl.num_programs(0) + tl.program_id(0)
        fill(zeros.ptr, 0.0, zeros.size, nth, FILLING * tl.num_programs(0), 4096)
