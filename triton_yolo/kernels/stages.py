"""The dense stages of task-aligned assignment: the metric of all pairs, and its K highest a ground-truth row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .launching import FIXED, compute_type, on_device
from .pairs import candidates, pair_metrics, pair_overlaps, walk_length, widened
from .rows import gt_rows, load_rows, row_sizes
from .topk import empty_list, is_among, keep_best, list_sizes, none, ordered


@triton.jit
def _align_metric_kernel(
    metric_ptr, overlaps_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, points_ptr, points_stride,
    gt, gt_stride, N, B, A,
    C: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, MIN_SIDE: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program writes metric and overlap of BLOCK_G rows with BLOCK_P anchors, both (N, A)."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = widened(box, MIN_SIDE)
    length = walk_length(info[2], wide, (1, 1), A, (1.0,), False)
    nth = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, (1, 1), (1.0,), False, EPS, DTYPE)
    overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
    metric = pair_metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, False, ALPHA, BETA, DTYPE)
    offs = offs_g.to(tl.int64)[:, None] * A + nth
    mask = (offs_g < N)[:, None] & (nth < A)
    tl.store(metric_ptr + offs, metric, mask=mask)
    tl.store(overlaps_ptr + offs, overlaps, mask=mask)


@triton.jit
def _select_topk_kernel(
    selected_ptr, metric_ptr, metric_stride, mask_ptr, mask_stride, N, G, A,
    K: tl.constexpr, KP: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK_G rows (of N = B * G) of the metric twice and writes which are among the K highest."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    image, slot = (offs_g // G).to(tl.int64), (offs_g % G).to(tl.int64)
    is_gt = offs_g < N
    if HAS_MASK:
        ptr = mask_ptr + image * mask_stride[0] + slot * mask_stride[1]
        is_gt = is_gt & (tl.load(ptr, mask=is_gt, other=0) != 0)
    metric_ptr += image * metric_stride[0] + slot * metric_stride[1]
    best, best_order = empty_list(BLOCK_G, K, KP, DTYPE)
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        offs = anchor.to(tl.int64) * metric_stride[2]
        metric = tl.load(metric_ptr + offs, mask=is_gt & (anchor < A), other=0.0).to(DTYPE)
        key, order = ordered(metric, anchor)
        best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, none(key)), order)
        start += BLOCK_P
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        offs = anchor.to(tl.int64) * metric_stride[2]
        metric = tl.load(metric_ptr + offs, mask=is_gt & (anchor < A), other=0.0).to(DTYPE)
        key, order = ordered(metric, anchor)
        is_selected = is_among(tl.where(metric > 0, key, none(key)), order, best, best_order)
        offs = offs_g.to(tl.int64) * A + anchor
        tl.store(selected_ptr + offs, is_selected, mask=(offs_g < N) & (anchor < A))
        start += BLOCK_P


@on_device
def align_metric(
    scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gt_boxes: Tensor, mask: Tensor,
    alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch_size, num_slots = labels.shape
    num_anchors = scores.shape[1]
    metric = scores.new_empty((batch_size, num_slots, num_anchors), dtype=working_dtype(boxes.dtype))
    overlaps = torch.empty_like(metric)
    if metric.numel():
        image_index = torch.arange(batch_size, device=labels.device)[:, None].where(mask, -1).reshape(-1)
        gt, gt_stride = gt_rows(image_index, labels.reshape(-1), gt_boxes.reshape(-1, 4))
        block_g, block_p, num_warps = row_sizes(batch_size * num_slots, num_anchors, 512, 4)
        # Rows come first: CUDA takes 2^31 programs in that dimension, 65,535 in the others.
        _align_metric_kernel[(triton.cdiv(batch_size * num_slots, block_g), triton.cdiv(num_anchors, block_p))](
            metric, overlaps, boxes, boxes.stride(), scores, scores.stride(), points, points.stride(),
            gt, gt_stride, batch_size * num_slots, batch_size, num_anchors,
            C=scores.shape[2], ALPHA=alpha, BETA=beta, MIN_SIDE=min_box_side, EPS=1e-9,
            DTYPE=compute_type(boxes.dtype), BLOCK_G=block_g, BLOCK_P=block_p, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return metric, overlaps


@on_device
def select_topk_candidates(metric: Tensor, topk: int, mask_gt: Tensor | None) -> Tensor:
    batch_size, num_slots, num_anchors = metric.shape
    selected = metric.new_empty(metric.shape, dtype=torch.bool)
    if selected.numel():
        num_rows = batch_size * num_slots
        block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, 512, 4)
        _select_topk_kernel[(triton.cdiv(num_rows, block_g),)](
            selected, metric, metric.stride(), mask_gt, (0, 0) if mask_gt is None else mask_gt.stride(),
            num_rows, num_slots, num_anchors,
            **list_sizes(topk, num_anchors), HAS_MASK=mask_gt is not None, DTYPE=compute_type(metric.dtype),
            BLOCK_G=block_g, BLOCK_P=block_p, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return selected
