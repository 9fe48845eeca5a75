"""Sums over what other programs wrote, by one program, in a fixed order."""

import triton
import triton.language as tl

TOTAL_SIZES: dict[str, int] = {"BLOCK": 4096, "num_warps": 8}
"""16 values a thread: 64 images at 640 px have some 2,000 partial sums. With four warps ptxas keeps to 40 registers on sm_80
and spills, whatever the values."""


@triton.jit
def total(ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``count`` values by one program, in a fixed order."""
    result = tl.zeros((BLOCK,), DTYPE)
    start = 0
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        result += tl.load(ptr + offs, mask=offs < count, other=0)
        start += BLOCK
    return tl.sum(result)
