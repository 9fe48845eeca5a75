"""Memory that is filled with one number."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Fill(NamedTuple):
    """So many numbers of memory."""

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
