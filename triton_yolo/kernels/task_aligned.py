"""Task-aligned assignment (TOOD, arXiv 2108.07755): one program a ground-truth row, no tensor of pairs.

The anchors of a row are the cells of its rectangle of the grid (``IS_GRID``: boxes contiguous in float32 or float64, scores are
logits), or all ``A`` of arbitrary points (boxes with any strides, scores are probabilities).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import box_rows, expectation, overlap, power, sigmoid
from .decode import decode_sizes, side_logits
from .grid import cell_centres, rectangle_cells, rectangle_size
from .launching import FIXED, compute_type, on_device
from .rows import CONTESTED, claim, contest, gt_rows, load_anchor_boxes, load_rows, owner, row_sizes
from .topk import NONE, empty_list, is_among, keep_best, pack, unpack_index

# ---- tiles


@triton.jit
def _widened(box, MIN_SIDE: tl.constexpr):
    """Boxes with every side at least ``MIN_SIDE`` about their centres."""
    x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    if MIN_SIDE > 0:
        x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        x1, x2 = tl.where(width < MIN_SIDE, x - MIN_SIDE / 2, x1), tl.where(width < MIN_SIDE, x + MIN_SIDE / 2, x2)
        y1, y2 = tl.where(height < MIN_SIDE, y - MIN_SIDE / 2, y1), tl.where(height < MIN_SIDE, y + MIN_SIDE / 2, y2)
    return x1, y1, x2, y2


@triton.jit
def _walk_length(is_gt, wide, shapes, A, STRIDES: tl.constexpr, IS_GRID: tl.constexpr):
    """How many anchors each row [g, 1] walks over, 0 for one that does not count."""
    if IS_GRID:
        length = rectangle_size(wide[0], wide[1], wide[2], wide[3], shapes, STRIDES)
    else:
        length = tl.zeros_like(is_gt.to(tl.int32)) + A
    return tl.where(is_gt, length, 0)


@triton.jit
def _candidates(
    nth, length, wide, points_ptr, points_stride, shapes,
    STRIDES: tl.constexpr, IS_GRID: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The ``nth`` anchors [g, n] of each row's walk, in increasing order, and whether each is a candidate."""
    is_candidate = nth < length
    if IS_GRID:
        anchor, x, y, _ = rectangle_cells(nth, wide[0], wide[1], wide[2], wide[3], shapes, STRIDES, DTYPE)
    else:
        anchor = nth + tl.zeros_like(length)
        ptr = points_ptr + anchor.to(tl.int64) * points_stride[0]
        x = tl.load(ptr, mask=is_candidate, other=0.0).to(DTYPE)
        y = tl.load(ptr + points_stride[1], mask=is_candidate, other=0.0).to(DTYPE)
    is_inside = (x - wide[0] > EPS) & (y - wide[1] > EPS) & (wide[2] - x > EPS) & (wide[3] - y > EPS)
    return anchor, is_candidate & is_inside


@triton.jit
def _overlaps(image, anchor, mask, box, boxes_ptr, boxes_stride, A, IS_GRID: tl.constexpr, DTYPE: tl.constexpr):
    """CIoU, not below 0, of the rows' boxes with the predicted ones of anchors [g, n]; 0 where ``mask`` is false or NaN."""
    x1, y1, x2, y2 = load_anchor_boxes(image, anchor, mask, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
    ciou = overlap(box[0], box[1], box[2], box[3], x1, y1, x2, y2, "ciou", 1e-7)
    return tl.where(mask & (ciou > 0), ciou, 0.0)


@triton.jit
def _metrics(
    image, anchor, label, mask, overlaps, scores_ptr, scores_stride,
    IS_GRID: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Metric [g, n] of pairs with these overlaps; 0 where ``mask`` is false or NaN."""
    if BETA > 0:
        mask = mask & (overlaps > 0)
    offs = image * scores_stride[0] + anchor.to(tl.int64) * scores_stride[1] + label * scores_stride[2]
    score = tl.load(scores_ptr + offs, mask=mask, other=0.0).to(DTYPE)
    if IS_GRID:
        score = sigmoid(score)
    metric = power(score, ALPHA) * power(overlaps, BETA)
    return tl.where(mask & (metric > 0), metric, 0.0)


# ---- kernels


@triton.jit
def _prepare_kernel(
    boxes_ptr, target_row_ptr, target_score_ptr, poison_ptr, dist_ptr, dist_stride, shapes, A,
    STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program decodes BLOCK_A anchors of one image to pixels and makes them background.

    Into ``poison`` (programs,) it writes 0, or NaN if one of its logits is not finite.
    """
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    dist_ptr += image * dist_stride[0]
    left, left_poison = _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, 0, R, RP, DTYPE)
    top, top_poison = _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, 1, R, RP, DTYPE)
    right, right_poison = _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, 2, R, RP, DTYPE)
    bottom, bottom_poison = _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, 3, R, RP, DTYPE)
    x, y, stride = cell_centres(offs_a, shapes, STRIDES, DTYPE)
    boxes = box_rows(x - left, y - top, x + right, y + bottom) * stride[:, None]
    cell = image * A + offs_a
    tl.store(boxes_ptr + cell[:, None] * 4 + tl.arange(0, 4)[None, :], boxes, mask=mask_a[:, None])
    tl.store(target_row_ptr + cell, tl.full((BLOCK_A,), -1, tl.int32), mask=mask_a)
    tl.store(target_score_ptr + cell, tl.zeros((BLOCK_A,), DTYPE), mask=mask_a)
    poison = tl.sum(left_poison + top_poison + right_poison + bottom_poison)
    tl.store(poison_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), poison)


@triton.jit
def _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side, and the sum of its logits times 0."""
    logits = side_logits(dist_ptr, dist_stride, offs_a, mask_a, side, R, RP, DTYPE)
    bins = tl.arange(0, RP)[:, None]
    distance = expectation(logits, bins.to(DTYPE), R)[1]
    return distance, tl.sum(tl.where(bins < R, logits * 0.0, 0.0), 0)


@triton.jit
def _claim_kernel(
    target_row_ptr, best_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, points_ptr, points_stride,
    gt, gt_stride, shapes, N, B, A,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, MIN_SIDE: tl.constexpr,
    EPS: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the K highest metrics of BLOCK_G rows and claims their anchors in ``target_row``."""
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = _widened(box, MIN_SIDE)
    length = _walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)
    best, best_order = empty_list(BLOCK_G, K, KP)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        overlaps = _overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
        metric = _metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE)
        key, order = pack(metric, anchor, IS_WIDE)
        best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, NONE), order, IS_WIDE)
        start += BLOCK_P

    is_claim = (best > NONE) & (tl.arange(0, KP) < K)[None, :]
    claim(target_row_ptr, best_ptr, info[0] * A, unpack_index(best, best_order, IS_WIDE), offs_g, is_claim)


@triton.jit
def _contest_kernel(
    target_row_ptr, best_ptr, boxes_ptr, boxes_stride, points_ptr, points_stride, gt, gt_stride, shapes, N, B, A,
    IS_TIE_BREAK: tl.constexpr, C: tl.constexpr, MIN_SIDE: tl.constexpr, EPS: tl.constexpr, STRIDES: tl.constexpr,
    IS_GRID: tl.constexpr, DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested candidates of BLOCK_G rows to their overlap."""
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = _widened(box, MIN_SIDE)
    length = _walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        cell = info[0] * A + anchor
        mask = mask & (tl.load(target_row_ptr + cell, mask=mask, other=-1) >= CONTESTED)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = _overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
            contest(target_row_ptr, best_ptr, cell, overlaps, offs_g, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


@triton.jit
def _score_kernel(
    row_sum_ptr, row_count_ptr, target_row_ptr, target_score_ptr, best_ptr,
    boxes_ptr, boxes_stride, scores_ptr, scores_stride, points_ptr, points_stride, gt, gt_stride, shapes, N, B, A,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, MIN_SIDE: tl.constexpr,
    EPS: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program settles the anchors of BLOCK_G rows: it writes row and target score where they stay positive.

    With K > 0 only the K highest metrics of a row stay, the others become background again. Only the row that owns an anchor
    writes there; others may read it before or after, and see that it is not theirs either way. Each row's sum of target
    scores and number of positives go to ``row_sum`` and ``row_count`` (N,).
    """
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = _widened(box, MIN_SIDE)
    row = offs_g.to(tl.int32)[:, None]
    length = _walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)

    best, best_order = empty_list(BLOCK_G, K, KP)
    if K > 0:
        start = 0
        while start < limit:
            nth = start + tl.arange(0, BLOCK_P)[None, :]
            anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
            mask = mask & (owner(info[0] * A + anchor, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
            overlaps = _overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
            metric = _metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE)
            key, order = pack(metric, anchor, IS_WIDE)
            best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, NONE), order, IS_WIDE)
            start += BLOCK_P

    max_metric = tl.zeros((BLOCK_G, 1), DTYPE)
    max_overlap = tl.zeros((BLOCK_G, 1), DTYPE)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        mask = mask & (owner(info[0] * A + anchor, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = _overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
            metric = _metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE)
            if K > 0:
                key, order = pack(metric, anchor, IS_WIDE)
                mask = is_among(tl.where(metric > 0, key, NONE), order, best, best_order, IS_WIDE)
            max_metric = tl.maximum(max_metric, tl.max(tl.where(mask, metric, 0.0), 1)[:, None])
            max_overlap = tl.maximum(max_overlap, tl.max(tl.where(mask, overlaps, 0.0), 1)[:, None])
        start += BLOCK_P

    score_sum = tl.zeros((BLOCK_G,), DTYPE)
    count = tl.zeros((BLOCK_G,), tl.int32)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        cell = info[0] * A + anchor
        is_mine = mask & (owner(cell, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
        if tl.max(is_mine.to(tl.int32)) > 0:
            overlaps = _overlaps(info[0], anchor, is_mine, box, boxes_ptr, boxes_stride, A, IS_GRID, DTYPE)
            metric = _metrics(
                info[0], anchor, info[1], is_mine, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE
            )
            stays = is_mine
            if K > 0:
                key, order = pack(metric, anchor, IS_WIDE)
                stays = is_among(tl.where(metric > 0, key, NONE), order, best, best_order, IS_WIDE)
            score = tl.where(stays, metric * max_overlap / (max_metric + EPS), 0.0)
            tl.store(target_row_ptr + cell, tl.where(stays, row, -1), mask=is_mine)
            tl.store(target_score_ptr + cell, score, mask=is_mine)
            score_sum += tl.sum(score, 1)
            count += tl.sum(stays.to(tl.int32), 1)
        start += BLOCK_P
    tl.store(row_sum_ptr + offs_g, score_sum, mask=offs_g < N)
    tl.store(row_count_ptr + offs_g, count, mask=offs_g < N)


@triton.jit
def _sum_kernel(
    score_sum_ptr, num_fg_ptr, row_sum_ptr, row_count_ptr, poison_ptr, N, programs,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the rows' sums and counts in a fixed order; ``poison`` makes the sum NaN."""
    score_sum = tl.zeros((BLOCK,), DTYPE)
    num_fg = tl.zeros((BLOCK,), tl.int64)
    poison = tl.zeros((BLOCK,), DTYPE)
    start = 0
    while start < N:
        offs = start + tl.arange(0, BLOCK)
        score_sum += tl.load(row_sum_ptr + offs, mask=offs < N, other=0.0)
        num_fg += tl.load(row_count_ptr + offs, mask=offs < N, other=0)
        start += BLOCK
    start = 0
    while start < programs:
        offs = start + tl.arange(0, BLOCK)
        poison += tl.load(poison_ptr + offs, mask=offs < programs, other=0.0)
        start += BLOCK
    tl.store(score_sum_ptr, tl.sum(score_sum) + tl.sum(poison))
    tl.store(num_fg_ptr, tl.sum(num_fg))


@triton.jit
def _align_metric_kernel(
    metric_ptr, overlaps_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, points_ptr, points_stride,
    gt, gt_stride, N, B, A,
    C: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, MIN_SIDE: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program writes metric and overlap of BLOCK_G rows with BLOCK_P anchors, both (N, A)."""
    offs_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = _widened(box, MIN_SIDE)
    length = _walk_length(info[2], wide, (1, 1), A, (1.0,), False)
    nth = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    anchor, mask = _candidates(nth, length, wide, points_ptr, points_stride, (1, 1), (1.0,), False, EPS, DTYPE)
    overlaps = _overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, A, False, DTYPE)
    metric = _metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, False, ALPHA, BETA, DTYPE)
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
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    image, slot = (offs_g // G).to(tl.int64), (offs_g % G).to(tl.int64)
    is_gt = offs_g < N
    if HAS_MASK:
        ptr = mask_ptr + image * mask_stride[0] + slot * mask_stride[1]
        is_gt = is_gt & (tl.load(ptr, mask=is_gt, other=0) != 0)
    metric_ptr += image * metric_stride[0] + slot * metric_stride[1]
    best, best_order = empty_list(BLOCK_G, K, KP)
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        offs = anchor.to(tl.int64) * metric_stride[2]
        metric = tl.load(metric_ptr + offs, mask=is_gt & (anchor < A), other=0.0).to(DTYPE)
        key, order = pack(metric, anchor, IS_WIDE)
        best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, NONE), order, IS_WIDE)
        start += BLOCK_P
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        offs = anchor.to(tl.int64) * metric_stride[2]
        metric = tl.load(metric_ptr + offs, mask=is_gt & (anchor < A), other=0.0).to(DTYPE)
        key, order = pack(metric, anchor, IS_WIDE)
        is_selected = is_among(tl.where(metric > 0, key, NONE), order, best, best_order, IS_WIDE)
        offs = offs_g.to(tl.int64) * A + anchor
        tl.store(selected_ptr + offs, is_selected, mask=(offs_g < N) & (anchor < A))
        start += BLOCK_P


# ---- operations


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
        block_g, block_p, num_warps = row_sizes(batch_size * num_slots, num_anchors)
        _align_metric_kernel[(triton.cdiv(num_anchors, block_p), triton.cdiv(batch_size * num_slots, block_g))](
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
        block_g, block_p, num_warps = row_sizes(num_rows, num_anchors)
        _select_topk_kernel[(triton.cdiv(num_rows, block_g),)](
            selected, metric, metric.stride(), mask_gt, (0, 0) if mask_gt is None else mask_gt.stride(),
            num_rows, num_slots, num_anchors,
            **_list_sizes(topk, num_anchors), HAS_MASK=mask_gt is not None, DTYPE=compute_type(metric.dtype),
            BLOCK_G=block_g, BLOCK_P=block_p, num_warps=num_warps, **FIXED,
        )  # fmt: skip
    return selected


@on_device
def task_aligned_assign(
    scores: Tensor, boxes: Tensor, points: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape, dtype = scores.shape[:2], working_dtype(boxes.dtype)
    target_row = scores.new_full(shape, -1, dtype=torch.int32)
    target_score = scores.new_zeros(shape, dtype=dtype)
    if shape.numel():
        _assign(
            target_row, target_score, scores, boxes, points, gt_rows(image_index, labels, gt_boxes), (1, 1), (1.0,), False,
            topk, topk2, alpha, beta, min_box_side, eps,
        )  # fmt: skip
    return target_row, target_score


@on_device
def yolo11_assign(
    pred_dist: Tensor, pred_scores: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch_size, num_anchors, _ = pred_scores.shape
    dtype, triton_dtype = working_dtype(pred_dist.dtype), compute_type(pred_dist.dtype)
    boxes = pred_dist.new_empty((batch_size, num_anchors, 4), dtype=dtype)
    target_row = pred_dist.new_empty((batch_size, num_anchors), dtype=torch.int32)
    target_score = torch.empty_like(target_row, dtype=dtype)
    block_a, num_warps = decode_sizes(num_anchors, reg_max, 1024)  # 2048 spilled in float32 with the logits last
    grid = (triton.cdiv(num_anchors, block_a), batch_size)
    poisons = pred_dist.new_empty(grid[0] * grid[1], dtype=dtype)
    row_sum, row_count = poisons, target_row
    if target_row.numel():
        _prepare_kernel[grid](
            boxes, target_row, target_score, poisons, pred_dist, pred_dist.stride(), tuple(feat_shapes), num_anchors,
            STRIDES=tuple(strides), R=reg_max, RP=triton.next_power_of_2(reg_max), DTYPE=triton_dtype, BLOCK_A=block_a,
            num_warps=num_warps, **FIXED,
        )  # fmt: skip
        row_sum, row_count = _assign(
            target_row, target_score, pred_scores, boxes, boxes, gt_rows(image_index, labels, gt_boxes),
            tuple(feat_shapes), tuple(strides), True, topk, topk2, alpha, beta, min_box_side, 1e-9,
        )  # fmt: skip
    score_sum, num_fg = poisons.new_empty(()), labels.new_empty((), dtype=torch.int64)
    _sum_kernel[(1,)](
        score_sum, num_fg, row_sum, row_count, poisons, len(labels) if target_row.numel() else 0, len(poisons),
        DTYPE=triton_dtype, BLOCK=1024, num_warps=4, **FIXED,
    )  # fmt: skip
    return target_row, target_score, score_sum, num_fg


def _assign(
    target_row: Tensor, target_score: Tensor, scores: Tensor, boxes: Tensor, points: Tensor, rows: tuple[Any, Any],
    shapes: tuple[int, ...], strides: tuple[float, ...], is_grid: bool,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill ``target_row`` and ``target_score``, which say background everywhere; return each row's sum and count."""
    batch_size, num_anchors, num_classes = scores.shape
    (gt, gt_stride), num_rows = rows, len(rows[0][0])
    row_sum = target_score.new_empty(num_rows)
    row_count = target_row.new_empty(num_rows)
    if num_rows == 0:
        return row_sum, row_count
    best = target_row.new_empty(target_row.shape, dtype=torch.int64)
    block_g, block_p, num_warps = row_sizes(num_rows, num_anchors)
    grid = (triton.cdiv(num_rows, block_g),)
    sizes = (num_rows, batch_size, num_anchors)
    geometry = {
        "C": num_classes, "MIN_SIDE": min_box_side, "EPS": eps, "STRIDES": strides, "IS_GRID": is_grid,
        "DTYPE": compute_type(boxes.dtype), "BLOCK_G": block_g, "BLOCK_P": block_p, "num_warps": num_warps, **FIXED,
    }  # fmt: skip
    exponents = {"ALPHA": alpha, "BETA": beta}
    _claim_kernel[grid](
        target_row, best, boxes, boxes.stride(), scores, scores.stride(), points, points.stride(), gt, gt_stride,
        shapes, *sizes, **_list_sizes(topk, num_anchors), **exponents, **geometry,
    )  # fmt: skip
    for is_tie_break in (False, True) if boxes.dtype == torch.float64 else (False,):
        _contest_kernel[grid](
            target_row, best, boxes, boxes.stride(), points, points.stride(), gt, gt_stride, shapes, *sizes,
            IS_TIE_BREAK=is_tie_break, **geometry,
        )  # fmt: skip
    _score_kernel[grid](
        row_sum, row_count, target_row, target_score, best, boxes, boxes.stride(), scores, scores.stride(),
        points, points.stride(), gt, gt_stride, shapes, *sizes,
        **_list_sizes(topk2 or 0, num_anchors), **exponents, **geometry,
    )  # fmt: skip
    return row_sum, row_count


def _list_sizes(topk: int, num_anchors: int) -> dict[str, int]:
    k = min(topk, num_anchors)
    return {"K": k, "KP": triton.next_power_of_2(max(k, 1))}
