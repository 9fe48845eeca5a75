"""Memory that is filled with one number."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Fill(NamedTuple):
    """So many numbers of memory that is to become 0."""

    ptr: Any
    count: int


@triton.jit
def fill(ptr, value, count, BLOCK: tl.constexpr):
    """All programs of a grid of two dimensions together set ``count`` numbers, which nobody waits for."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    start = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        tl.store(ptr + offs, tl.full((BLOCK,), value, tl.float32).to(ptr.dtype.element_ty), mask=offs < count)
        start += programs * BLOCK
