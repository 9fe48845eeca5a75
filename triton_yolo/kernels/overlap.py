"""Overlap of boxes, element by element, forward and backward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import box_columns, box_rows, overlap, overlap_derivative
from .launching import FIXED, INTERPRETED, compute_type, on_device, rounded


def overlap_sizes(num_pairs: int) -> tuple[int, int]:
    """Pairs a program and warps: two pairs a thread keep the derivative's thirty live values in registers."""
    if INTERPRETED:
        return min(triton.next_power_of_2(num_pairs), 2**16), 1
    return 256, 4


@triton.jit
def _element_offsets(index, sizes, stride):
    """Offset of every ``index`` into the flattened ``sizes`` of a tensor with these strides."""
    offs = tl.zeros_like(index)
    for i in tl.static_range(len(sizes)):
        offs += index % sizes[len(sizes) - 1 - i] * stride[len(sizes) - 1 - i]
        index = index // sizes[len(sizes) - 1 - i]
    return offs


@triton.jit
def _load_boxes(ptr, stride, offs, mask, DTYPE: tl.constexpr):
    """Four coordinates [n] of the boxes at ``offs``, whose coordinates lie ``stride`` apart."""
    boxes = tl.load(ptr + offs[:, None] + tl.arange(0, 4)[None, :] * stride, mask=mask[:, None], other=0.0)
    return box_columns(boxes.to(DTYPE))


@triton.jit
def _bbox_iou_kernel(
    out_ptr, a_ptr, a_stride, b_ptr, b_stride, sizes, n,
    KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK pairs of boxes through their strides and writes their overlaps."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    ax1, ay1, ax2, ay2 = _load_boxes(a_ptr, a_stride[-1], _element_offsets(index, sizes, a_stride), mask, DTYPE)
    bx1, by1, bx2, by2 = _load_boxes(b_ptr, b_stride[-1], _element_offsets(index, sizes, b_stride), mask, DTYPE)
    tl.store(out_ptr + index, overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, EPS), mask=mask)


@triton.jit
def _bbox_iou_backward_kernel(
    grad_a_ptr, grad_b_ptr, grad_ptr, grad_stride, a_ptr, a_stride, b_ptr, b_stride, sizes, n,
    KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK pairs and the gradients of their overlaps and writes the gradients of both boxes."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    ax1, ay1, ax2, ay2 = _load_boxes(a_ptr, a_stride[-1], _element_offsets(index, sizes, a_stride), mask, DTYPE)
    bx1, by1, bx2, by2 = _load_boxes(b_ptr, b_stride[-1], _element_offsets(index, sizes, b_stride), mask, DTYPE)
    grad = tl.load(grad_ptr + _element_offsets(index, sizes, grad_stride), mask=mask, other=0.0).to(DTYPE)[:, None]
    offs, mask = index[:, None] * 4 + tl.arange(0, 4)[None, :], mask[:, None]
    x1, y1, x2, y2 = overlap_derivative(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, EPS)
    tl.store(grad_a_ptr + offs, rounded(box_rows(x1, y1, x2, y2) * grad, grad_a_ptr.dtype.element_ty), mask=mask)
    x1, y1, x2, y2 = overlap_derivative(bx1, by1, bx2, by2, ax1, ay1, ax2, ay2, KIND, EPS)
    tl.store(grad_b_ptr + offs, rounded(box_rows(x1, y1, x2, y2) * grad, grad_b_ptr.dtype.element_ty), mask=mask)


@on_device
def bbox_iou(a: Tensor, b: Tensor, kind: str, eps: float) -> Tensor:
    dtype = torch.promote_types(working_dtype(a.dtype), working_dtype(b.dtype))
    result = a.new_empty(a.shape[:-1], dtype=dtype)
    sizes, (a_stride, b_stride) = _collapsed(a.shape[:-1], a.stride()[:-1], b.stride()[:-1])
    block, num_warps = overlap_sizes(result.numel())
    if result.numel():
        _bbox_iou_kernel[(triton.cdiv(result.numel(), block),)](
            result, a, (*a_stride, a.stride(-1)), b, (*b_stride, b.stride(-1)), sizes, result.numel(),
            KIND=kind, EPS=eps, DTYPE=compute_type(dtype), BLOCK=block, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return result


@on_device
def bbox_iou_backward(grad: Tensor, a: Tensor, b: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
    sizes, (grad_stride, a_stride, b_stride) = _collapsed(grad.shape, grad.stride(), a.stride()[:-1], b.stride()[:-1])
    block, num_warps = overlap_sizes(grad.numel())
    if grad.numel():
        _bbox_iou_backward_kernel[(triton.cdiv(grad.numel(), block),)](
            grad_a, grad_b, grad, grad_stride, a, (*a_stride, a.stride(-1)), b, (*b_stride, b.stride(-1)),
            sizes, grad.numel(),
            KIND=kind, EPS=eps, DTYPE=compute_type(grad.dtype), BLOCK=block, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return grad_a, grad_b


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
