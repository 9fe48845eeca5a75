"""YOLOX's loss for a given assignment, forward and backward, with the one-hot target implied."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import cross_entropy_with_logits, overlap, overlap_derivative, rounded, scalar, sigmoid
from .decode import Raw, channel_sizes, load_raw, raw_corners, raw_grad, store_raw
from .grid import cell_centres
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
def _target_boxes(row, is_pos, xywh_ptr, x, y, stride, DTYPE: tl.constexpr):
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
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def _or_zero(slope):
    """0 for the NaN that the box of a finite prediction gives where it overflows."""
    return tl.where(slope == slope, slope, 0.0)


@triton.jit
def _with_l1(slope, error, is_l1):
    return slope + tl.where(is_l1, _sign(error), 0.0)


# ---- kernels


@triton.jit
def _yolox_loss_kernel(
    partial_ptr, raw_boxes, obj_logits, logits, matched, grid, C, STRIDES: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads the objectness of BLOCK_A anchors of one image, and everything of those that are positive.

    It writes its own sums to ``partial`` (4, programs): box, objectness, class, L1.
    """
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
    cls = tl.zeros((BLOCK_A, BLOCK_C), DTYPE)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        raw = load_raw(raw_boxes, image, offs_a, is_pos, DTYPE)
        gt, target = _target_boxes(row, is_pos, matched.xywh_ptr, x - 0.5, y - 0.5, stride, DTYPE)
        pred = raw_corners(raw, 0.0, 0.0, stride)
        iou = overlap(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
        # NaN where the box of a finite prediction overflows: it overlaps nothing.
        if KIND == "iou":
            iou = tl.where(iou == iou, iou, 0.0)
            box = 1 - iou * iou
        else:
            box = 1 - tl.where(iou > 1, 1.0, tl.where(iou >= -1, iou, -1.0))
        box = tl.where(is_pos, box, 0.0).to(DTYPE)
        l1 = tl.abs(raw.dx - target.dx) + tl.abs(raw.dy - target.dy)
        l1 = l1 + tl.abs(raw.log_w - target.log_w) + tl.abs(raw.log_h - target.log_h)
        l1 = tl.where(is_pos, l1, 0.0).to(DTYPE)

        label = tl.load(matched.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)
        score = tl.load(matched.iou_ptr + image * grid.A + offs_a, mask=is_pos, other=0.0)
        offs = image * logits.image + offs_a.to(tl.int64) * logits.anchor
        start = 0
        while start < C:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = is_pos[:, None] & (offs_c < C)[None, :]
            ptr = logits.ptr + offs[:, None] + offs_c.to(tl.int64)[None, :] * logits.channel
            x_cls = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
            one_hot = tl.where(offs_c[None, :] == label[:, None], score[:, None], 0.0)
            cls += tl.where(mask, cross_entropy_with_logits(x_cls, one_hot), 0.0)
            start += BLOCK_C
    tl.store(partial_ptr + program, tl.sum(box))
    tl.store(partial_ptr + programs + program, tl.sum(obj))
    tl.store(partial_ptr + 2 * programs + program, tl.sum(cls))
    tl.store(partial_ptr + 3 * programs + program, tl.sum(l1))


@triton.jit(do_not_specialize=["programs"])
def _yolox_total_kernel(
    loss_ptr, terms_ptr, num_fg_ptr, normaliser_ptr, partial_ptr, counts_ptr, l1_gain_ptr, iou_gain: tl.float64, programs,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the partial sums, and writes the loss and its terms. ``l1_gain`` is 0 or 1.

    If there are ``counts``, it makes the normaliser, for backward too, and positives per ground truth.
    """
    if counts_ptr is None:
        normaliser = tl.load(normaliser_ptr).to(DTYPE)
    else:
        positives = tl.load(counts_ptr)
        normaliser = tl.where(tl.load(counts_ptr + 2) > 0, float("nan"), tl.maximum(positives, 1).to(DTYPE)).to(DTYPE)
        tl.store(normaliser_ptr, normaliser)
        num_gt = tl.maximum(tl.load(counts_ptr + 1), 1).to(DTYPE)
        if tl.float32 == DTYPE:
            tl.store(num_fg_ptr, tl.div_rn(positives.to(DTYPE), num_gt))
        else:
            tl.store(num_fg_ptr, positives.to(DTYPE) / num_gt)
    box_term = scalar(iou_gain, DTYPE) * total(partial_ptr, programs, DTYPE, BLOCK) / normaliser
    obj_term = total(partial_ptr + programs, programs, DTYPE, BLOCK) / normaliser
    cls_term = total(partial_ptr + 2 * programs, programs, DTYPE, BLOCK) / normaliser
    l1 = total(partial_ptr + 3 * programs, programs, DTYPE, BLOCK)
    l1_term = tl.where(tl.load(l1_gain_ptr) > 0, l1, 0.0) / normaliser
    tl.store(terms_ptr, box_term)
    tl.store(terms_ptr + 1, obj_term)
    tl.store(terms_ptr + 2, cls_term)
    tl.store(terms_ptr + 3, l1_term)
    tl.store(loss_ptr, box_term + obj_term + cls_term + l1_term)


@triton.jit
def _yolox_grad_kernel(
    out, grad_ptr, normaliser_ptr, preds, matched, l1_gain_ptr, grid, iou_gain: tl.float64, CHANNELS,
    STRIDES: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of all channels of BLOCK_A anchors of one image: of background, objectness and zeros."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < grid.A
    row = tl.load(matched.row_ptr + image * grid.A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    scale = tl.full((), 1, DTYPE)
    if grad_ptr is not None:
        scale = tl.load(grad_ptr).to(DTYPE)
    scale = scale / tl.load(normaliser_ptr).to(DTYPE)
    d_x = tl.zeros((BLOCK_A,), DTYPE)
    d_y = tl.zeros((BLOCK_A,), DTYPE)
    d_w = tl.zeros((BLOCK_A,), DTYPE)
    d_h = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        raw = load_raw(preds, image, offs_a, is_pos, DTYPE)
        gt, target = _target_boxes(row, is_pos, matched.xywh_ptr, x - 0.5, y - 0.5, stride, DTYPE)
        pred = raw_corners(raw, 0.0, 0.0, stride)
        iou = overlap(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
        x1, y1, x2, y2 = overlap_derivative(pred.x1, pred.y1, pred.x2, pred.y2, gt.x1, gt.y1, gt.x2, gt.y2, KIND, 1e-16)
        if KIND == "iou":
            slope = -2 * iou
        else:
            slope = tl.where(tl.abs(iou) == 1, -0.5, tl.where(tl.abs(iou) < 1, -1.0, 0.0)).to(DTYPE)
        slope = scalar(iou_gain, DTYPE) * slope
        d_raw = raw_grad(Box(slope * x1, slope * y1, slope * x2, slope * y2), raw, stride)
        is_l1 = tl.load(l1_gain_ptr) > 0
        d_x = tl.where(is_pos, _with_l1(_or_zero(d_raw.dx), raw.dx - target.dx, is_l1), 0.0).to(DTYPE)
        d_y = tl.where(is_pos, _with_l1(_or_zero(d_raw.dy), raw.dy - target.dy, is_l1), 0.0).to(DTYPE)
        d_w = tl.where(is_pos, _with_l1(_or_zero(d_raw.log_w), raw.log_w - target.log_w, is_l1), 0.0).to(DTYPE)
        d_h = tl.where(is_pos, _with_l1(_or_zero(d_raw.log_h), raw.log_h - target.log_h, is_l1), 0.0).to(DTYPE)

    store_raw(out, image, Raw(d_x * scale, d_y * scale, d_w * scale, d_h * scale), offs_a, mask_a)

    label = tl.load(matched.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)
    score = tl.load(matched.iou_ptr + image * grid.A + offs_a, mask=is_pos, other=0.0)
    start = 4
    while start < CHANNELS:
        offs_c = start + tl.arange(0, BLOCK_C)
        channel = offs_c[None, :]
        mask = mask_a[:, None] & (channel < CHANNELS)
        is_obj = (channel == 4) & mask
        is_logit = is_obj | (is_pos[:, None] & mask)
        offs = offs_a.to(tl.int64)[:, None] * preds.anchor + offs_c.to(tl.int64)[None, :] * preds.channel
        logits = tl.load(preds.ptr + image * preds.image + offs, mask=is_logit, other=0.0).to(DTYPE)
        one_hot = tl.where(channel == 5 + label[:, None], score[:, None], 0.0)
        one_hot = tl.where(is_obj, is_pos.to(DTYPE)[:, None], one_hot)
        result = tl.where(is_logit, sigmoid(logits) - one_hot, 0.0)
        offs = offs_a.to(tl.int64)[:, None] * out.anchor + offs_c.to(tl.int64)[None, :] * out.channel
        tl.store(out.ptr + image * out.image + offs, rounded(result * scale, out.ptr.dtype.element_ty), mask=mask)
        start += BLOCK_C
