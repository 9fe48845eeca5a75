"""YOLOX's loss of positives, with its derivative: tile functions; and kernels for a given assignment.

The one-hot target is implied.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import (
    cross_entropy_with_logits,
    log_product,
    overlap,
    overlap_derivative,
    rounded,
    scalar,
    sigmoid_of,
    split_sigmoid,
    split_softplus,
)
from .decode import Raw, channel_sizes, load_raw, raw_corners, raw_grad, store_raw
from .grid import cell_centres, sized
from .launch import INTERPRETED
from .reduce import total
from .rows import Box, load_row_boxes


def positive_sizes(num_anchors: int, num_classes: int, stride_c: int) -> tuple[int, int, int]:
    """Anchors and classes a tile, and warps, of a pass over the positives: small tiles, of which most have none."""
    if INTERPRETED or stride_c == 1:
        return channel_sizes(num_anchors, num_classes, stride_c)
    return 128, min(triton.next_power_of_2(num_classes), 16), 4


class Matched(NamedTuple):
    """An assignment: row and matched IoU (B, A) of every anchor; label (N,), centre and size (N, 4) of every row."""

    row_ptr: Any
    iou_ptr: Any
    label_ptr: Any
    xywh_ptr: Any


# ---- tiles


@triton.jit
def target_boxes(row, is_pos, xywh_ptr, x, y, stride, DTYPE: tl.constexpr):
    """True boxes [n]: corners in pixels from the cell's corner (x, y) in cells, and what the raw output should be.

    Far from the corner of the cell float32 would round the overlap's derivative to 1e-5.
    """
    gt = load_row_boxes(xywh_ptr, 4, 1, row, is_pos, DTYPE)
    gt_x, gt_y, gt_w, gt_h = gt.x1, gt.y1, gt.x2, gt.y2
    near_x, near_y = gt_x - x * stride, gt_y - y * stride
    corners = Box(near_x - gt_w / 2, near_y - gt_h / 2, near_x + gt_w / 2, near_y + gt_h / 2)
    tiny = tl.full(gt_w.shape, 1e-8, DTYPE)
    return corners, Raw(gt_x / stride - x, gt_y / stride - y, tl.log(gt_w / stride + tiny), tl.log(gt_h / stride + tiny))


@triton.jit
def box_losses(raw, gt, target, is_pos, stride, KIND: tl.constexpr):
    """Box and L1 loss [n] of positives, 0 of others."""
    pred = raw_corners(raw, 0.0, 0.0, stride)
    iou = overlap(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
    # NaN where the box of a finite prediction overflows: it overlaps nothing.
    if KIND == "iou":
        iou = tl.where(iou == iou, iou, 0.0)
        box = 1 - iou * iou
    else:
        box = 1 - tl.where(iou > 1, 1.0, tl.where(iou >= -1, iou, -1.0))
    l1 = tl.abs(raw.dx - target.dx) + tl.abs(raw.dy - target.dy)
    l1 = l1 + tl.abs(raw.log_w - target.log_w) + tl.abs(raw.log_h - target.log_h)
    return tl.where(is_pos, box, 0.0).to(iou.dtype), tl.where(is_pos, l1, 0.0).to(iou.dtype)


@triton.jit
def class_losses(logits, offs, is_pos, label, score, C, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Class loss [n] of positives, 0 of others, whose logits begin at ``offs`` [n].

    The sum of softplus is the logarithm of a product of up to eight factors 1 + e, kept as its excess over 1. The label's logit
    is loaded apart: what depends on the row would be computed in the layout of the classes else.
    """
    most = tl.zeros((offs.shape[0], BLOCK_C), DTYPE)
    start = 0
    while start < C:
        excess = tl.zeros((offs.shape[0], BLOCK_C), DTYPE)
        end = tl.minimum(start + 8 * BLOCK_C, C)
        while start < end:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = is_pos[:, None] & (offs_c < C)[None, :]
            ptr = logits.ptr + offs[:, None] + offs_c.to(tl.int64)[None, :] * logits.channel
            more, e = split_softplus(tl.load(ptr, mask=mask, other=-1e4).to(DTYPE))  # a softplus of 0
            most += more
            excess = tl.fma(excess, e, excess + e)
            start += BLOCK_C
        most += log_product(excess)
    at_label = tl.load(logits.ptr + offs + label.to(tl.int64) * logits.channel, mask=is_pos, other=0.0).to(DTYPE)
    return tl.where(is_pos, tl.sum(most, 1) - at_label * score, 0.0)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def _or_zero(slope):
    """0 for the NaN that the box of a finite prediction gives where it overflows."""
    return tl.where(slope == slope, slope, 0.0)


@triton.jit
def _raw_slope(slope, error, is_pos, is_l1):
    slope = _or_zero(slope) + tl.where(is_l1, _sign(error), 0.0)
    return tl.where(is_pos, slope, 0.0).to(error.dtype)


@triton.jit
def box_gradient(raw, gt, target, is_pos, stride, is_l1, iou_gain, KIND: tl.constexpr):
    """Gradient of the raw boxes [n] of positives, 0 of others."""
    pred = raw_corners(raw, 0.0, 0.0, stride)
    iou = overlap(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
    x1, y1, x2, y2 = overlap_derivative(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
    if KIND == "iou":
        slope = -2 * iou
    else:
        slope = tl.where(tl.abs(iou) == 1, -0.5, tl.where(tl.abs(iou) < 1, -1.0, 0.0)).to(iou.dtype)
    slope = scalar(iou_gain, iou.dtype) * slope
    d_raw = raw_grad(Box(slope * x1, slope * y1, slope * x2, slope * y2), raw, stride)
    return Raw(
        _raw_slope(d_raw.dx, raw.dx - target.dx, is_pos, is_l1), _raw_slope(d_raw.dy, raw.dy - target.dy, is_pos, is_l1),
        _raw_slope(d_raw.log_w, raw.log_w - target.log_w, is_pos, is_l1),
        _raw_slope(d_raw.log_h, raw.log_h - target.log_h, is_pos, is_l1),
    )  # fmt: skip


@triton.jit
def store_logit_gradient(
    out, preds, image, anchor, mask_a, is_pos, label, score, scale, CHANNELS, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write the gradient of objectness and classes of anchors [n]: of background, that of its objectness and zeros."""
    base = image * preds.image + anchor.to(tl.int64) * preds.anchor
    out_base = image * out.image + anchor.to(tl.int64) * out.anchor
    start = 4
    while start < CHANNELS:
        offs_c = start + tl.arange(0, BLOCK_C)
        channel = offs_c[None, :]
        mask = mask_a[:, None] & (channel < CHANNELS)
        is_obj = (channel == 4) & mask
        is_logit = is_obj | (is_pos[:, None] & mask)
        offs = base[:, None] + offs_c.to(tl.int64)[None, :] * preds.channel
        logits = tl.load(preds.ptr + offs, mask=is_logit, other=0.0).to(DTYPE)
        one_hot = tl.where(channel == 5 + label[:, None], score[:, None], 0.0)
        one_hot = tl.where(is_obj, is_pos.to(DTYPE)[:, None], one_hot)
        is_up, e = split_sigmoid(logits)
        result = tl.where(is_logit, sigmoid_of(is_up, e, DTYPE) - one_hot, 0.0)
        offs = out_base[:, None] + offs_c.to(tl.int64)[None, :] * out.channel
        tl.store(out.ptr + offs, rounded(result * scale, out.ptr.dtype.element_ty), mask=mask)
        start += BLOCK_C


@triton.jit
def store_terms(loss_ptr, terms, box, obj, cls, l1, normaliser, l1_gain_ptr, iou_gain):
    """Write the loss and its terms from their sums. ``l1_gain`` is 0 or 1."""
    box_term = scalar(iou_gain, box.dtype) * box / normaliser
    obj_term, cls_term = obj / normaliser, cls / normaliser
    l1_term = tl.where(tl.load(l1_gain_ptr) > 0, l1, 0.0) / normaliser
    tl.store(terms[0], box_term)
    tl.store(terms[1], obj_term)
    tl.store(terms[2], cls_term)
    tl.store(terms[3], l1_term)
    tl.store(loss_ptr, box_term + obj_term + cls_term + l1_term)


# ---- kernels


@triton.jit
def _yolox_loss_kernel(
    partial_ptr, raw_boxes, obj_logits, logits, matched, grid, C, STRIDES: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads the objectness of BLOCK_A anchors of one image, and everything of those that are positive.

    It writes its own sums to ``partial`` (4, programs): box, objectness, class, L1.
    """
    grid = sized(grid)
    image = tl.program_id(1).to(tl.int64)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < grid.A
    row = tl.load(matched.row_ptr + image * grid.A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    obj_ptr = obj_logits.ptr + image * obj_logits.row + offs_a.to(tl.int64) * obj_logits.column
    obj = tl.load(obj_ptr, mask=mask_a, other=0.0).to(DTYPE)
    obj = tl.where(mask_a, cross_entropy_with_logits(obj, is_pos.to(DTYPE)), 0.0)

    box = tl.zeros((BLOCK_A,), DTYPE)
    l1 = tl.zeros((BLOCK_A,), DTYPE)
    cls = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        raw = load_raw(raw_boxes, image, offs_a, is_pos, DTYPE)
        gt, target = target_boxes(row, is_pos, matched.xywh_ptr, x - 0.5, y - 0.5, stride, DTYPE)
        box, l1 = box_losses(raw, gt, target, is_pos, stride, KIND)
        label = tl.load(matched.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)
        score = tl.load(matched.iou_ptr + image * grid.A + offs_a, mask=is_pos, other=0.0)
        offs = image * logits.image + offs_a.to(tl.int64) * logits.anchor
        cls = class_losses(logits, offs, is_pos, label, score, C, DTYPE, BLOCK_C)
    tl.store(partial_ptr + program, tl.sum(box))
    tl.store(partial_ptr + programs + program, tl.sum(obj))
    tl.store(partial_ptr + 2 * programs + program, tl.sum(cls))
    tl.store(partial_ptr + 3 * programs + program, tl.sum(l1))


@triton.jit(do_not_specialize=["programs"])
def _yolox_total_kernel(
    loss_ptr, terms, normaliser_ptr, partial_ptr, l1_gain_ptr, iou_gain: tl.float64, programs, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the partial sums, and writes the loss and its terms."""
    normaliser = tl.load(normaliser_ptr).to(DTYPE)
    box, obj = total(partial_ptr, programs, DTYPE, BLOCK), total(partial_ptr + programs, programs, DTYPE, BLOCK)
    cls = total(partial_ptr + 2 * programs, programs, DTYPE, BLOCK)
    l1 = total(partial_ptr + 3 * programs, programs, DTYPE, BLOCK)
    store_terms(loss_ptr, terms, box, obj, cls, l1, normaliser, l1_gain_ptr, iou_gain)


@triton.jit
def _yolox_grad_kernel(
    out, grad_ptr, normaliser_ptr, preds, matched, l1_gain_ptr, grid, iou_gain: tl.float64, CHANNELS,
    STRIDES: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of all channels of BLOCK_A anchors of one image: of background, objectness and zeros."""
    grid = sized(grid)
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < grid.A
    row = tl.load(matched.row_ptr + image * grid.A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    scale = tl.load(grad_ptr).to(DTYPE) / tl.load(normaliser_ptr).to(DTYPE)
    zero = tl.zeros((BLOCK_A,), DTYPE)
    d_raw = Raw(zero, zero, zero, zero)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        raw = load_raw(preds, image, offs_a, is_pos, DTYPE)
        gt, target = target_boxes(row, is_pos, matched.xywh_ptr, x - 0.5, y - 0.5, stride, DTYPE)
        d_raw = box_gradient(raw, gt, target, is_pos, stride, tl.load(l1_gain_ptr) > 0, iou_gain, KIND)
    d_raw = Raw(d_raw.dx * scale, d_raw.dy * scale, d_raw.log_w * scale, d_raw.log_h * scale)
    store_raw(out, image, d_raw, offs_a, mask_a)
    label = tl.load(matched.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)
    score = tl.load(matched.iou_ptr + image * grid.A + offs_a, mask=is_pos, other=0.0)
    store_logit_gradient(out, preds, image, offs_a, mask_a, is_pos, label, score, scale, CHANNELS, DTYPE, BLOCK_C)
