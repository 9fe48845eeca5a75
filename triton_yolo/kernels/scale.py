"""Gradients times the one that arrives from outside, which is 1 in most trainings."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import compute_type
from .boxes import rounded
from .launch import INTERPRETED, Launch, Plan, Run, Workspace, cdiv, new, place_of, run

_PROGRAMS = 512  # as a GPU runs at once: thousands that return at once took 12 us on an H200


class Scale(NamedTuple):
    first: Tensor
    second: Tensor
    grad: Tensor


@triton.jit
def _scale(ptr, factor, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(ptr + offs, mask=offs < n, other=0.0).to(DTYPE)
        tl.store(ptr + offs, rounded(x * factor, ptr.dtype.element_ty), mask=offs < n)
        start += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=["first_count", "second_count"])
def _scale_kernel(first_ptr, second_ptr, grad_ptr, first_count, second_count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """All programs together multiply one of two tensors each, or return at once if the factor is 1."""
    factor = tl.load(grad_ptr).to(DTYPE)
    if factor != 1:
        if tl.program_id(1) == 0:
            _scale(first_ptr, factor, first_count, DTYPE, BLOCK)
        else:
            _scale(second_ptr, factor, second_count, DTYPE, BLOCK)


class _ScalePlan(Plan):
    def __init__(self, x: Scale, out: Sequence[Tensor], num_rows: int) -> None:
        block = 2**16 if INTERPRETED else 8192
        self.counts = x.first.numel(), x.second.numel()
        self.grid = min(cdiv(max(self.counts), block), _PROGRAMS), len(out), 1
        self.scale = Launch(_scale_kernel, 4, DTYPE=compute_type(x.grad.dtype), BLOCK=block)
        super().__init__(Workspace(), self.scale)

    def launch(self, run: Run) -> None:
        address, (first, second, grad) = run.address, run.x
        self.scale(run.stream, self.grid, address(first), address(second), address(grad), *self.counts)


def scale_(grads: Sequence[Tensor], grad: Tensor) -> None:
    """Multiply dense tensors, of any layout, in place, two by two."""
    for start in range(0, len(grads), 2):
        pair = grads[start : start + 2]
        first, second = pair[0], pair[-1]
        counts = first.numel(), second.numel()
        if counts != (0, 0):
            key = _ScalePlan, len(pair), counts, first.dtype, second.dtype, grad.dtype, place_of(grad)
            run(_ScalePlan, new(Scale, (first, second, grad)), pair, key=key)
