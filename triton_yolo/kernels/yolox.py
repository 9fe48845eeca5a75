"""YOLOX's loss for a given assignment, forward and backward, with the one-hot target implied."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import cross_entropy_with_logits, overlap, overlap_derivative, sigmoid
from .decode import channel_sizes, load_raw_boxes, raw_corners, raw_grad, store_raw_boxes
from .grid import cell_centres
from .launching import FIXED, INTERPRETED, TOTAL_SIZES, compute_type, on_device, rounded, scalar, total


def positive_sizes(num_anchors: int, num_classes: int, stride_c: int) -> tuple[int, int, int]:
    """Anchors and classes a tile, and warps, of a pass over the positives: small tiles, of which most have none."""
    if INTERPRETED or stride_c == 1:
        return channel_sizes(num_anchors, num_classes, stride_c)
    return 128, min(triton.next_power_of_2(num_classes), 16), 4


# ---- tiles


@triton.jit
def _target_boxes(row, is_pos, gt_ptr, gt_stride, x, y, stride, DTYPE: tl.constexpr):
    """True boxes [n]: corners in pixels from the cell's corner (x, y) in cells, and what the raw output should be.

    Far from the corner of the cell float32 would round the overlap's derivative to 1e-5.
    """
    ptr = gt_ptr + row.to(tl.int64) * gt_stride[0]
    gt_x = tl.load(ptr, mask=is_pos, other=0.0).to(DTYPE)
    gt_y = tl.load(ptr + gt_stride[1], mask=is_pos, other=0.0).to(DTYPE)
    gt_w = tl.load(ptr + 2 * gt_stride[1], mask=is_pos, other=0.0).to(DTYPE)
    gt_h = tl.load(ptr + 3 * gt_stride[1], mask=is_pos, other=0.0).to(DTYPE)
    near_x, near_y = gt_x - x * stride, gt_y - y * stride
    corners = (near_x - gt_w / 2, near_y - gt_h / 2, near_x + gt_w / 2, near_y + gt_h / 2)
    tiny = tl.full(gt_w.shape, 1e-8, DTYPE)
    return corners, (gt_x / stride - x, gt_y / stride - y, tl.log(gt_w / stride + tiny), tl.log(gt_h / stride + tiny))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def _or_zero(slope):
    """0 for the NaN that the box of a finite prediction gives where it overflows."""
    return tl.where(slope == slope, slope, 0.0)


# ---- kernels


@triton.jit
def _yolox_loss_kernel(
    partial_ptr, raw_ptr, obj_ptr, cls_ptr, preds_stride, target_row_ptr, matched_iou_ptr, labels_ptr, gt_ptr, gt_stride,
    shapes, A, C,
    STRIDES: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads the objectness of BLOCK_A anchors of one image, and everything of those that are positive.

    It writes its own sums to ``partial`` (4, programs): box, objectness, class, L1.
    """
    image = tl.program_id(1).to(tl.int64)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    row = tl.load(target_row_ptr + image * A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    offs = image * preds_stride[0] + offs_a.to(tl.int64) * preds_stride[1]
    obj_logits = tl.load(obj_ptr + offs, mask=mask_a, other=0.0).to(DTYPE)
    obj = tl.where(mask_a, cross_entropy_with_logits(obj_logits, is_pos.to(DTYPE)), 0.0)

    box = tl.zeros((BLOCK_A,), DTYPE)
    l1 = tl.zeros((BLOCK_A,), DTYPE)
    cls = tl.zeros((BLOCK_A, BLOCK_C), DTYPE)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, shapes, STRIDES, DTYPE)
        raw = load_raw_boxes(raw_ptr + image * preds_stride[0], preds_stride, offs_a, is_pos, DTYPE)
        gt, raw_target = _target_boxes(row, is_pos, gt_ptr, gt_stride, x - 0.5, y - 0.5, stride, DTYPE)
        x1, y1, x2, y2 = raw_corners(raw, 0.0, 0.0, stride)
        iou = overlap(x1, y1, x2, y2, gt[0], gt[1], gt[2], gt[3], KIND, 1e-16)
        # NaN where the box of a finite prediction overflows: it overlaps nothing.
        if KIND == "iou":
            iou = tl.where(iou == iou, iou, 0.0)
            box = 1 - iou * iou
        else:
            box = 1 - tl.where(iou > 1, 1.0, tl.where(iou >= -1, iou, -1.0))
        box = tl.where(is_pos, box, 0.0).to(DTYPE)
        l1 = tl.abs(raw[0] - raw_target[0]) + tl.abs(raw[1] - raw_target[1])
        l1 = tl.where(is_pos, l1 + tl.abs(raw[2] - raw_target[2]) + tl.abs(raw[3] - raw_target[3]), 0.0).to(DTYPE)

        label = tl.load(labels_ptr + row, mask=is_pos, other=-1).to(tl.int32)
        score = tl.load(matched_iou_ptr + image * A + offs_a, mask=is_pos, other=0.0)
        start = 0
        while start < C:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = is_pos[:, None] & (offs_c < C)[None, :]
            logits_ptr = cls_ptr + offs[:, None] + offs_c.to(tl.int64)[None, :] * preds_stride[2]
            logits = tl.load(logits_ptr, mask=mask, other=0.0).to(DTYPE)
            target = tl.where(offs_c[None, :] == label[:, None], score[:, None], 0.0)
            cls += tl.where(mask, cross_entropy_with_logits(logits, target), 0.0)
            start += BLOCK_C
    tl.store(partial_ptr + program, tl.sum(box))
    tl.store(partial_ptr + programs + program, tl.sum(obj))
    tl.store(partial_ptr + 2 * programs + program, tl.sum(cls))
    tl.store(partial_ptr + 3 * programs + program, tl.sum(l1))


@triton.jit
def _yolox_total_kernel(
    loss_ptr, terms_ptr, partial_ptr, normaliser_ptr, l1_gain_ptr, iou_gain: tl.float64, programs,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the partial sums, and writes the loss and its terms. ``l1_gain`` is 0 or 1."""
    normaliser = tl.load(normaliser_ptr).to(DTYPE)
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
    out_ptr, out_stride, grad_ptr, raw_ptr, preds_stride, target_row_ptr, matched_iou_ptr, normaliser_ptr, labels_ptr,
    gt_ptr, gt_stride, l1_gain_ptr, shapes, iou_gain: tl.float64, A, CHANNELS,
    STRIDES: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of all channels of BLOCK_A anchors of one image: of background, objectness and zeros."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    row = tl.load(target_row_ptr + image * A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    scale = tl.load(grad_ptr).to(DTYPE) / tl.load(normaliser_ptr).to(DTYPE)
    out_ptr += image * out_stride[0]
    d_x = tl.zeros((BLOCK_A,), DTYPE)
    d_y = tl.zeros((BLOCK_A,), DTYPE)
    d_w = tl.zeros((BLOCK_A,), DTYPE)
    d_h = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row) >= 0:
        x, y, stride = cell_centres(offs_a, shapes, STRIDES, DTYPE)
        raw = load_raw_boxes(raw_ptr + image * preds_stride[0], preds_stride, offs_a, is_pos, DTYPE)
        gt, raw_target = _target_boxes(row, is_pos, gt_ptr, gt_stride, x - 0.5, y - 0.5, stride, DTYPE)
        x1, y1, x2, y2 = raw_corners(raw, 0.0, 0.0, stride)
        iou = overlap(x1, y1, x2, y2, gt[0], gt[1], gt[2], gt[3], KIND, 1e-16)
        corners = overlap_derivative(x1, y1, x2, y2, gt[0], gt[1], gt[2], gt[3], KIND, 1e-16)
        if KIND == "iou":
            slope = -2 * iou
        else:
            slope = tl.where(tl.abs(iou) == 1, -0.5, tl.where(tl.abs(iou) < 1, -1.0, 0.0)).to(DTYPE)
        slope = scalar(iou_gain, DTYPE) * slope
        corners = (slope * corners[0], slope * corners[1], slope * corners[2], slope * corners[3])
        d_x, d_y, d_w, d_h = raw_grad(corners, raw, stride)
        d_x, d_y, d_w, d_h = _or_zero(d_x), _or_zero(d_y), _or_zero(d_w), _or_zero(d_h)
        is_l1 = tl.load(l1_gain_ptr) > 0
        d_x = tl.where(is_pos, d_x + tl.where(is_l1, _sign(raw[0] - raw_target[0]), 0.0), 0.0).to(DTYPE)
        d_y = tl.where(is_pos, d_y + tl.where(is_l1, _sign(raw[1] - raw_target[1]), 0.0), 0.0).to(DTYPE)
        d_w = tl.where(is_pos, d_w + tl.where(is_l1, _sign(raw[2] - raw_target[2]), 0.0), 0.0).to(DTYPE)
        d_h = tl.where(is_pos, d_h + tl.where(is_l1, _sign(raw[3] - raw_target[3]), 0.0), 0.0).to(DTYPE)

    store_raw_boxes(out_ptr, out_stride, (d_x * scale, d_y * scale, d_w * scale, d_h * scale), offs_a, mask_a)

    label = tl.load(labels_ptr + row, mask=is_pos, other=-1).to(tl.int32)
    score = tl.load(matched_iou_ptr + image * A + offs_a, mask=is_pos, other=0.0)
    raw_ptr += image * preds_stride[0]
    start = 4
    while start < CHANNELS:
        offs_c = start + tl.arange(0, BLOCK_C)
        channel = offs_c[None, :]
        mask = mask_a[:, None] & (channel < CHANNELS)
        is_obj = (channel == 4) & mask
        is_logit = is_obj | (is_pos[:, None] & mask)
        offs = offs_a.to(tl.int64)[:, None] * preds_stride[1] + offs_c.to(tl.int64)[None, :] * preds_stride[2]
        logits = tl.load(raw_ptr + offs, mask=is_logit, other=0.0).to(DTYPE)
        target = tl.where(channel == 5 + label[:, None], score[:, None], 0.0)
        target = tl.where(is_obj, is_pos.to(DTYPE)[:, None], target)
        result = tl.where(is_logit, sigmoid(logits) - target, 0.0)
        offs = offs_a.to(tl.int64)[:, None] * out_stride[1] + offs_c.to(tl.int64)[None, :] * out_stride[2]
        tl.store(out_ptr + offs, rounded(result * scale, out_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_C


# ---- operations


@on_device
def yolox_loss(
    preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor, labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch_size, num_anchors, num_channels = preds.shape
    dtype = working_dtype(preds.dtype)
    block_a, block_c, num_warps = positive_sizes(num_anchors, num_channels - 5, preds.stride(2))
    grid = (triton.cdiv(num_anchors, block_a), batch_size)
    partial = preds.new_empty((4, grid[0] * grid[1]), dtype=dtype)
    loss, terms = preds.new_empty((), dtype=dtype), preds.new_empty(4, dtype=dtype)
    if partial.numel():
        _yolox_loss_kernel[grid](
            partial, preds, preds[..., 4], preds[..., 5:], preds.stride(), target_row, matched_iou,
            labels, gt_xywh, gt_xywh.stride(), tuple(feat_shapes), num_anchors, num_channels - 5,
            STRIDES=tuple(strides), KIND=iou_loss, DTYPE=compute_type(dtype), BLOCK_A=block_a, BLOCK_C=block_c,
            num_warps=num_warps, **FIXED,
        )  # fmt: skip
    _yolox_total_kernel[(1,)](
        loss, terms, partial, normaliser, l1_gain, iou_gain, partial.shape[1],
        DTYPE=compute_type(dtype), **TOTAL_SIZES, **FIXED,
    )  # fmt: skip
    return loss, terms


@on_device
def yolox_loss_backward(
    grad: Tensor, preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor,
    labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> Tensor:  # fmt: skip
    result = torch.empty_like(preds)
    batch_size, num_anchors, num_channels = preds.shape
    block_a, block_c, num_warps = channel_sizes(num_anchors, num_channels, result.stride(2))
    if result.numel():
        _yolox_grad_kernel[(triton.cdiv(num_anchors, block_a), batch_size)](
            result, result.stride(), grad, preds, preds.stride(), target_row, matched_iou, normaliser, labels,
            gt_xywh, gt_xywh.stride(), l1_gain, tuple(feat_shapes), iou_gain, num_anchors, num_channels,
            STRIDES=tuple(strides), KIND=iou_loss, DTYPE=compute_type(preds.dtype), BLOCK_A=block_a, BLOCK_C=block_c,
            num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return result
