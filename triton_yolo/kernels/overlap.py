"""Overlap of boxes, element by element, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._signatures import BboxIoU, BboxIoUBackward, GradBoxes, Overlaps, wider
from .arguments import compute_type
from .boxes import box_columns, box_rows, overlap, overlap_derivative, rounded
from .launch import INTERPRETED, Launch, Plan, Run, Workspace, cdiv, run


def overlap_sizes(num_pairs: int) -> tuple[int, int]:
    """Pairs a program and warps: two pairs a thread keep the derivative's thirty live values in registers."""
    if INTERPRETED:
        return min(triton.next_power_of_2(num_pairs), 2**16), 1
    return 256, 4


class Elements(NamedTuple):
    """A tensor of as many dimensions as ``steps``, and of boxes that many coordinates in another one, ``coordinate`` apart."""

    ptr: Any
    steps: tuple[int, ...]
    coordinate: int


@triton.jit
def _element_offsets(index, sizes, steps):
    """Offset of every ``index`` into the flattened ``sizes`` of a tensor with these strides."""
    offs = tl.zeros_like(index)
    for i in tl.static_range(len(sizes)):
        offs += index % sizes[len(sizes) - 1 - i] * steps[len(sizes) - 1 - i]
        index = index // sizes[len(sizes) - 1 - i]
    return offs


@triton.jit
def _load_boxes(boxes, index, sizes, mask, DTYPE: tl.constexpr):
    """Four coordinates [n] of the boxes of every ``index``."""
    offs = _element_offsets(index, sizes, boxes.steps)
    rows = tl.load(boxes.ptr + offs[:, None] + tl.arange(0, 4)[None, :] * boxes.coordinate, mask=mask[:, None], other=0.0)
    return box_columns(rows.to(DTYPE))


@triton.jit
def _bbox_iou_kernel(out_ptr, a, b, sizes, n, KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A program reads BLOCK pairs of boxes through their strides and writes their overlaps."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    ax1, ay1, ax2, ay2 = _load_boxes(a, index, sizes, mask, DTYPE)
    bx1, by1, bx2, by2 = _load_boxes(b, index, sizes, mask, DTYPE)
    tl.store(out_ptr + index, overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, EPS), mask=mask)


@triton.jit
def _bbox_iou_backward_kernel(
    grad_a_ptr, grad_b_ptr, grad, a, b, sizes, n,
    KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK pairs and the gradients of their overlaps and writes the gradients of both boxes."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    ax1, ay1, ax2, ay2 = _load_boxes(a, index, sizes, mask, DTYPE)
    bx1, by1, bx2, by2 = _load_boxes(b, index, sizes, mask, DTYPE)
    grad_ptr = grad.ptr + _element_offsets(index, sizes, grad.steps)
    slope = tl.load(grad_ptr, mask=mask, other=0.0).to(DTYPE)[:, None]
    offs, mask = index[:, None] * 4 + tl.arange(0, 4)[None, :], mask[:, None]
    x1, y1, x2, y2 = overlap_derivative(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, EPS)
    tl.store(grad_a_ptr + offs, rounded(box_rows(x1, y1, x2, y2) * slope, grad_a_ptr.dtype.element_ty), mask=mask)
    x1, y1, x2, y2 = overlap_derivative(bx1, by1, bx2, by2, ax1, ay1, ax2, ay2, KIND, EPS)
    tl.store(grad_b_ptr + offs, rounded(box_rows(x1, y1, x2, y2) * slope, grad_b_ptr.dtype.element_ty), mask=mask)


class _OverlapPlan(Plan):
    def __init__(self, kernel: Any, x: BboxIoU | BboxIoUBackward) -> None:
        self.count = x.a.shape[:-1].numel()
        block, num_warps = overlap_sizes(self.count)
        self.grid = cdiv(self.count, block), 1, 1
        dtype = compute_type(wider(x.a, x.b))
        self.kernel = Launch(kernel, num_warps, KIND=x.kind, EPS=x.eps, DTYPE=dtype, BLOCK=block)
        super().__init__(Workspace(), self.kernel)


class _BboxIoU(_OverlapPlan):
    def __init__(self, x: BboxIoU, out: Overlaps, num_rows: int) -> None:
        super().__init__(_bbox_iou_kernel, x)
        self.sizes, self.steps = _collapsed(x.a.shape[:-1], x.a.stride()[:-1], x.b.stride()[:-1])

    def launch(self, run: Run) -> None:
        a, b = run.x.a, run.x.b
        self.kernel(
            run.stream, self.grid, run.address(run.out.overlaps), Elements(run.address(a), self.steps[0], a.stride(-1)),
            Elements(run.address(b), self.steps[1], b.stride(-1)), self.sizes, self.count,
        )  # fmt: skip


class _BboxIoUBackward(_OverlapPlan):
    def __init__(self, x: BboxIoUBackward, out: GradBoxes, num_rows: int) -> None:
        super().__init__(_bbox_iou_backward_kernel, x)
        self.sizes, self.steps = _collapsed(x.grad.shape, x.grad.stride(), x.a.stride()[:-1], x.b.stride()[:-1])

    def launch(self, run: Run) -> None:
        x, out, address = run.x, run.out, run.address
        self.kernel(
            run.stream, self.grid, address(out.grad_a), address(out.grad_b), Elements(address(x.grad), self.steps[0], 0),
            Elements(address(x.a), self.steps[1], x.a.stride(-1)), Elements(address(x.b), self.steps[2], x.b.stride(-1)),
            self.sizes, self.count,
        )  # fmt: skip


def bbox_iou(x: BboxIoU) -> Overlaps:
    out = x.allocate()
    if out.overlaps.numel():
        run(_BboxIoU, x, out)
    return out


def bbox_iou_backward(x: BboxIoUBackward) -> GradBoxes:
    out = x.allocate()
    if x.grad.numel():
        run(_BboxIoUBackward, x, out)
    return out


def _collapsed(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same elements with neighbouring dimensions joined wherever all of ``strides`` allow it."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(step[-1] == size * stride[dim] for step, stride in zip(steps, strides, strict=True)):
            sizes[-1] *= size
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[dim]
        else:
            sizes.append(size)
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[dim])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(sizes), [tuple(step) for step in steps]
