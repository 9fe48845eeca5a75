"""From what a head puts out to boxes: distance distributions (arXiv 2006.04388) and YOLOX's, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import box_columns, box_rows, expectation
from .launching import FIXED, INTERPRETED, compute_type, on_device, rounded


def decode_sizes(num_anchors: int, reg_max: int, logits: int = 2048) -> tuple[int, int]:
    """Anchors a program and warps of a kernel over the box logits, which holds so many ``logits`` of a side at a time.

    One warp with 64 logits of a side a thread: every load is 16 bytes, the softmax exchanges values between two threads at
    most, and there are no spills. Twice as many spilled backward in bfloat16.
    """
    bins = triton.next_power_of_2(reg_max)
    if INTERPRETED:
        return min(triton.next_power_of_2(num_anchors), max(1, 2**18 // bins)), 1
    return max(32, min(128, logits // bins)), 1


@triton.jit
def side_logits(ptr, stride, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Load the logits [RP, n] of one side of anchors ``offs_a`` of one image; ``stride`` is (image, anchor, logit)."""
    bins = tl.arange(0, RP)
    mask = mask_a[None, :]
    if R != RP:
        mask = mask & (bins < R)[:, None]
    offs = (side * R + bins).to(tl.int64)[:, None] * stride[2] + offs_a.to(tl.int64)[None, :] * stride[1]
    logits = tl.load(ptr + offs, mask=mask, other=0.0).to(DTYPE)
    if R != RP:
        logits = tl.where((bins < R)[:, None], logits, float("-inf"))
    return logits


@triton.jit
def side_distance(ptr, stride, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side in cells."""
    logits = side_logits(ptr, stride, offs_a, mask_a, side, R, RP, DTYPE)
    return expectation(logits, tl.arange(0, RP)[:, None].to(DTYPE), R)[1]


@triton.jit
def _decode_dfl_kernel(
    boxes_ptr, dist_ptr, dist_stride, points_ptr, points_stride, strides_ptr, strides_stride, A,
    R: tl.constexpr, RP: tl.constexpr, HAS_STRIDES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program reads the 4R logits of BLOCK_A anchors of one image once and writes their boxes (B, A, 4)."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    dist_ptr += image * dist_stride[0]
    left = side_distance(dist_ptr, dist_stride, offs_a, mask_a, 0, R, RP, DTYPE)
    top = side_distance(dist_ptr, dist_stride, offs_a, mask_a, 1, R, RP, DTYPE)
    right = side_distance(dist_ptr, dist_stride, offs_a, mask_a, 2, R, RP, DTYPE)
    bottom = side_distance(dist_ptr, dist_stride, offs_a, mask_a, 3, R, RP, DTYPE)

    x = tl.load(points_ptr + offs_a * points_stride[0], mask=mask_a, other=0.0).to(DTYPE)
    y = tl.load(points_ptr + offs_a * points_stride[0] + points_stride[1], mask=mask_a, other=0.0).to(DTYPE)
    boxes = box_rows(x - left, y - top, x + right, y + bottom)
    if HAS_STRIDES:
        stride = tl.load(strides_ptr + offs_a * strides_stride, mask=mask_a, other=0.0).to(DTYPE)
        boxes = boxes * stride[:, None]
    offs = (image * A + offs_a)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(boxes_ptr + offs, boxes, mask=mask_a[:, None])


@triton.jit
def _decode_dfl_side_backward(
    out_ptr, out_stride, dist_ptr, dist_stride, grad, offs_a, mask_a, side,
    R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one side's logits from that of its distance [n]."""
    bins = tl.arange(0, RP)[:, None].to(DTYPE)
    if R == 1:
        result = grad[None, :]
    else:
        logits = side_logits(dist_ptr, dist_stride, offs_a, mask_a, side, R, RP, DTYPE)
        probs, value = expectation(logits, bins, R)
        result = probs * (bins - value[None, :]) * grad[None, :]
    store_side(out_ptr, out_stride, result, offs_a, mask_a, side, R, RP)


@triton.jit
def store_side(ptr, stride, values, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr):
    """Store what belongs to the logits [RP, n] of one side of anchors ``offs_a``."""
    bins = tl.arange(0, RP)
    mask = mask_a[None, :]
    if R != RP:
        mask = mask & (bins < R)[:, None]
    offs = (side * R + bins).to(tl.int64)[:, None] * stride[2] + offs_a.to(tl.int64)[None, :] * stride[1]
    tl.store(ptr + offs, rounded(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_dfl_backward_kernel(
    out_ptr, out_stride, grad_ptr, grad_stride, dist_ptr, dist_stride, strides_ptr, strides_stride, A,
    R: tl.constexpr, RP: tl.constexpr, HAS_STRIDES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program reads the box gradients and logits of BLOCK_A anchors of one image and writes the gradient of the logits."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    offs = offs_a.to(tl.int64)[:, None] * grad_stride[1] + tl.arange(0, 4)[None, :] * grad_stride[2]
    grad = tl.load(grad_ptr + image * grad_stride[0] + offs, mask=mask_a[:, None], other=0.0).to(DTYPE)
    if HAS_STRIDES:
        grad = grad * tl.load(strides_ptr + offs_a * strides_stride, mask=mask_a, other=0.0).to(DTYPE)[:, None]
    left, top, right, bottom = box_columns(grad)
    out_ptr += image * out_stride[0]
    dist_ptr += image * dist_stride[0]
    _decode_dfl_side_backward(out_ptr, out_stride, dist_ptr, dist_stride, -left, offs_a, mask_a, 0, R, RP, DTYPE)
    _decode_dfl_side_backward(out_ptr, out_stride, dist_ptr, dist_stride, -top, offs_a, mask_a, 1, R, RP, DTYPE)
    _decode_dfl_side_backward(out_ptr, out_stride, dist_ptr, dist_stride, right, offs_a, mask_a, 2, R, RP, DTYPE)
    _decode_dfl_side_backward(out_ptr, out_stride, dist_ptr, dist_stride, bottom, offs_a, mask_a, 3, R, RP, DTYPE)


@on_device
def decode_dfl(pred_dist: Tensor, anchor_points: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    batch_size, num_anchors, _ = pred_dist.shape
    boxes = pred_dist.new_empty((batch_size, num_anchors, 4), dtype=working_dtype(pred_dist.dtype))
    block, num_warps = decode_sizes(num_anchors, reg_max)
    if boxes.numel():
        _decode_dfl_kernel[(triton.cdiv(num_anchors, block), batch_size)](
            boxes, pred_dist, pred_dist.stride(), anchor_points, anchor_points.stride(),
            strides, 0 if strides is None else strides.stride(0), num_anchors,
            R=reg_max, RP=triton.next_power_of_2(reg_max), HAS_STRIDES=strides is not None,
            DTYPE=compute_type(pred_dist.dtype), BLOCK_A=block, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return boxes


@on_device
def decode_dfl_backward(grad: Tensor, pred_dist: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    result = torch.empty_like(pred_dist)
    batch_size, num_anchors, _ = pred_dist.shape
    block, num_warps = decode_sizes(num_anchors, reg_max)
    if result.numel():
        _decode_dfl_backward_kernel[(triton.cdiv(num_anchors, block), batch_size)](
            result, result.stride(), grad, grad.stride(), pred_dist, pred_dist.stride(),
            strides, 0 if strides is None else strides.stride(0), num_anchors,
            R=reg_max, RP=triton.next_power_of_2(reg_max), HAS_STRIDES=strides is not None,
            DTYPE=compute_type(pred_dist.dtype), BLOCK_A=block, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return result


# ---- YOLOX


def channel_sizes(num_anchors: int, num_channels: int, stride_c: int) -> tuple[int, int, int]:
    """Anchors and channels a tile, and warps, of a pass over all channels: 16 a thread along whichever is contiguous."""
    channels = triton.next_power_of_2(num_channels)
    if INTERPRETED:
        block_a = min(max(triton.next_power_of_2(num_anchors), 32), 2**14)
        return block_a, min(channels, max(1, 2**20 // block_a)), 1
    if stride_c == 1:
        return 32, min(channels, 32), 4
    return 256, min(channels, 8), 4


@triton.jit
def load_raw_boxes(ptr, stride, offs_a, mask_a, DTYPE: tl.constexpr):
    """(dx, dy, log w, log h) [n] of anchors of one image; ``stride`` is (image, anchor, channel)."""
    # One channel after the other: 3 * stride can pass 2^31.
    ptr += offs_a.to(tl.int64) * stride[1]
    dx = tl.load(ptr, mask=mask_a, other=0.0).to(DTYPE)
    ptr += stride[2]
    dy = tl.load(ptr, mask=mask_a, other=0.0).to(DTYPE)
    ptr += stride[2]
    log_w = tl.load(ptr, mask=mask_a, other=0.0).to(DTYPE)
    ptr += stride[2]
    log_h = tl.load(ptr, mask=mask_a, other=0.0).to(DTYPE)
    return dx, dy, log_w, log_h


@triton.jit
def store_raw_boxes(ptr, stride, raw, offs_a, mask_a):
    offs = offs_a.to(tl.int64)[:, None] * stride[1] + tl.arange(0, 4).to(tl.int64)[None, :] * stride[2]
    boxes = rounded(box_rows(raw[0], raw[1], raw[2], raw[3]), ptr.dtype.element_ty)
    tl.store(ptr + offs, boxes, mask=mask_a[:, None])


@triton.jit
def raw_corners(raw, x, y, stride):
    """Corners in pixels of raw boxes whose cells begin at (x, y) in cells."""
    x, y = (x + raw[0]) * stride, (y + raw[1]) * stride
    w, h = tl.exp(raw[2]) * stride, tl.exp(raw[3]) * stride
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


@triton.jit
def raw_grad(corners, raw, stride):
    """Gradient of raw boxes from that of their corners."""
    x1, y1, x2, y2 = corners[0] * stride, corners[1] * stride, corners[2] * stride, corners[3] * stride
    return x1 + x2, y1 + y2, (x2 - x1) / 2 * tl.exp(raw[2]), (y2 - y1) / 2 * tl.exp(raw[3])


@triton.jit
def _decode_yolox_kernel(
    boxes_ptr, preds_ptr, preds_stride, points_ptr, points_stride, strides_ptr, strides_stride, A,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program reads the four box channels of BLOCK_A anchors of one image and writes their boxes (B, A, 4)."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    raw = load_raw_boxes(preds_ptr + image * preds_stride[0], preds_stride, offs_a, mask_a, DTYPE)
    x = tl.load(points_ptr + offs_a * points_stride[0], mask=mask_a, other=0.0).to(DTYPE)
    y = tl.load(points_ptr + offs_a * points_stride[0] + points_stride[1], mask=mask_a, other=0.0).to(DTYPE)
    stride = tl.load(strides_ptr + offs_a * strides_stride, mask=mask_a, other=0.0).to(DTYPE)
    x1, y1, x2, y2 = raw_corners(raw, x - 0.5, y - 0.5, stride)
    offs = (image * A + offs_a)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(boxes_ptr + offs, box_rows(x1, y1, x2, y2), mask=mask_a[:, None])


@triton.jit
def _decode_yolox_backward_kernel(
    out_ptr, out_stride, grad_ptr, grad_stride, preds_ptr, preds_stride, strides_ptr, strides_stride, A, CHANNELS,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of all channels of BLOCK_A anchors of one image."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    raw = load_raw_boxes(preds_ptr + image * preds_stride[0], preds_stride, offs_a, mask_a, DTYPE)
    corners = load_raw_boxes(grad_ptr + image * grad_stride[0], grad_stride, offs_a, mask_a, DTYPE)
    stride = tl.load(strides_ptr + offs_a * strides_stride, mask=mask_a, other=0.0).to(DTYPE)
    out_ptr += image * out_stride[0]
    store_raw_boxes(out_ptr, out_stride, raw_grad(corners, raw, stride), offs_a, mask_a)
    start = 4
    while start < CHANNELS:
        offs_c = start + tl.arange(0, BLOCK_C)
        offs = offs_a.to(tl.int64)[:, None] * out_stride[1] + offs_c.to(tl.int64)[None, :] * out_stride[2]
        mask = mask_a[:, None] & (offs_c < CHANNELS)[None, :]
        tl.store(out_ptr + offs, tl.zeros((BLOCK_A, BLOCK_C), out_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_C


@on_device
def decode_yolox(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    batch_size, num_anchors, _ = preds.shape
    boxes = preds.new_empty((batch_size, num_anchors, 4), dtype=working_dtype(preds.dtype))
    block, _, num_warps = channel_sizes(num_anchors, 4, preds.stride(2))
    if boxes.numel():
        _decode_yolox_kernel[(triton.cdiv(num_anchors, block), batch_size)](
            boxes, preds, preds.stride(), anchor_points, anchor_points.stride(), strides, strides.stride(0), num_anchors,
            DTYPE=compute_type(preds.dtype), BLOCK_A=block, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return boxes


@on_device
def decode_yolox_backward(grad: Tensor, preds: Tensor, strides: Tensor) -> Tensor:
    result = torch.empty_like(preds)
    batch_size, num_anchors, num_channels = preds.shape
    block_a, block_c, num_warps = channel_sizes(num_anchors, num_channels, preds.stride(2))
    if result.numel():
        _decode_yolox_backward_kernel[(triton.cdiv(num_anchors, block_a), batch_size)](
            result, result.stride(), grad, grad.stride(), preds, preds.stride(), strides, strides.stride(0),
            num_anchors, num_channels,
            DTYPE=compute_type(preds.dtype), BLOCK_A=block_a, BLOCK_C=block_c, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return result
