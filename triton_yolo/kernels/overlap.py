"""Overlap of boxes, element by element, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._signatures import BboxIoU, BboxIoUBackward, GradBoxes, Overlaps, ProbIoU, ProbIoUBackward, wider
from .arguments import compute_type
from .boxes import box_columns, box_rows, overlap, overlap_derivative, rounded
from .launch import INTERPRETED, Launch, Plan, Run, Workspace, cdiv, run
from .oriented import Oriented, prob_overlap, prob_overlap_derivative


def overlap_sizes(num_pairs: int, pairs_a_thread: int = 2) -> tuple[int, int]:
    """Pairs a program and warps: two pairs a thread keep the derivative's thirty live values in registers."""
    if INTERPRETED:
        return min(triton.next_power_of_2(num_pairs), 2**16), 1
    return 128 * pairs_a_thread, 4


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
def _load_oriented(boxes, index, sizes, mask, DTYPE: tl.constexpr):
    """The boxes [n] of every ``index``."""
    x, y, w, h = _load_boxes(boxes, index, sizes, mask, DTYPE)
    angle_ptr = boxes.ptr + _element_offsets(index, sizes, boxes.steps) + 4 * boxes.coordinate
    return Oriented(x, y, w, h, tl.load(angle_ptr, mask=mask, other=0.0).to(DTYPE))


@triton.jit
def _store_oriented(ptr, index, box, slope, mask):
    """Write boxes [n], multiplied by ``slope``, as rows of five."""
    offs = index[:, None] * 5 + tl.arange(0, 4)[None, :]
    rows = box_rows(box.x, box.y, box.w, box.h) * slope[:, None]
    tl.store(ptr + offs, rounded(rows, ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(ptr + (index * 5 + 4), rounded(box.angle * slope, ptr.dtype.element_ty), mask=mask)


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


@triton.jit
def _prob_iou_kernel(out_ptr, a, b, sizes, n, EPS: tl.constexpr, FLOOR: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The same of oriented boxes."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    box_a, box_b = _load_oriented(a, index, sizes, mask, DTYPE), _load_oriented(b, index, sizes, mask, DTYPE)
    tl.store(out_ptr + index, prob_overlap(box_a, box_b, EPS, FLOOR), mask=mask)


@triton.jit
def _prob_iou_backward_kernel(
    grad_a_ptr, grad_b_ptr, grad, a, b, sizes, n,
    EPS: tl.constexpr, FLOOR: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of oriented boxes."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    box_a, box_b = _load_oriented(a, index, sizes, mask, DTYPE), _load_oriented(b, index, sizes, mask, DTYPE)
    slope = tl.load(grad.ptr + _element_offsets(index, sizes, grad.steps), mask=mask, other=0.0).to(DTYPE)
    _store_oriented(grad_a_ptr, index, prob_overlap_derivative(box_a, box_b, EPS, FLOOR), slope, mask)
    _store_oriented(grad_b_ptr, index, prob_overlap_derivative(box_b, box_a, EPS, FLOOR), slope, mask)


class _OverlapPlan(Plan):
    """Programs of a kernel that go over all pairs, whose other constants are ``options``."""

    def __init__(self, kernel: Any, x: Any, pairs_a_thread: int = 2, **options: Any) -> None:
        self.count = x.a.shape[:-1].numel()
        block, num_warps = overlap_sizes(self.count, pairs_a_thread)
        self.grid = cdiv(self.count, block), 1, 1
        dtype = compute_type(wider(x.a, x.b))
        self.kernel = Launch(kernel, num_warps, **options, EPS=x.eps, DTYPE=dtype, BLOCK=block)
        super().__init__(Workspace(), self.kernel)


class _Forward(_OverlapPlan):
    def __init__(self, kernel: Any, x: BboxIoU | ProbIoU, **options: Any) -> None:
        super().__init__(kernel, x, **options)
        self.sizes, self.steps = _collapsed(x.a.shape[:-1], x.a.stride()[:-1], x.b.stride()[:-1])

    def launch(self, run: Run) -> None:
        a, b = run.x.a, run.x.b
        self.kernel(
            run.stream, self.grid, run.address(run.out.overlaps), Elements(run.address(a), self.steps[0], a.stride(-1)),
            Elements(run.address(b), self.steps[1], b.stride(-1)), self.sizes, self.count,
        )  # fmt: skip


class _Backward(_OverlapPlan):
    def __init__(self, kernel: Any, x: BboxIoUBackward | ProbIoUBackward, **options: Any) -> None:
        super().__init__(kernel, x, **options)
        self.sizes, self.steps = _collapsed(x.grad.shape, x.grad.stride(), x.a.stride()[:-1], x.b.stride()[:-1])

    def launch(self, run: Run) -> None:
        x, out, address = run.x, run.out, run.address
        self.kernel(
            run.stream, self.grid, address(out.grad_a), address(out.grad_b), Elements(address(x.grad), self.steps[0], 0),
            Elements(address(x.a), self.steps[1], x.a.stride(-1)), Elements(address(x.b), self.steps[2], x.b.stride(-1)),
            self.sizes, self.count,
        )  # fmt: skip


class _BboxIoU(_Forward):
    def __init__(self, x: BboxIoU, out: Overlaps, num_rows: int) -> None:
        super().__init__(_bbox_iou_kernel, x, KIND=x.kind)


class _BboxIoUBackward(_Backward):
    def __init__(self, x: BboxIoUBackward, out: GradBoxes, num_rows: int) -> None:
        super().__init__(_bbox_iou_backward_kernel, x, KIND=x.kind)


class _ProbIoU(_Forward):
    def __init__(self, x: ProbIoU, out: Overlaps, num_rows: int) -> None:
        super().__init__(_prob_iou_kernel, x, FLOOR=x.floor)


class _ProbIoUBackward(_Backward):
    def __init__(self, x: ProbIoUBackward, out: GradBoxes, num_rows: int) -> None:
        super().__init__(_prob_iou_backward_kernel, x, pairs_a_thread=1, FLOOR=x.floor)


def bbox_iou(x: BboxIoU) -> Overlaps:
    return _filled(_BboxIoU, x)


def bbox_iou_backward(x: BboxIoUBackward) -> GradBoxes:
    return _filled(_BboxIoUBackward, x)


def prob_iou(x: ProbIoU) -> Overlaps:
    return _filled(_ProbIoU, x)


def prob_iou_backward(x: ProbIoUBackward) -> GradBoxes:
    return _filled(_ProbIoUBackward, x)


def _filled(make: Any, x: Any) -> Any:
    """What an operation allocates, after the launches of its plan; without a pair there are none."""
    out = x.allocate()
    if out[0].numel():
        run(make, x, out)
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
