"""Task-aligned assignment (TOOD, arXiv 2108.07755): one program a ground-truth row, no tensor of pairs."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import expectation
from .decode import decode_sizes, side_logits
from .grid import cell_centres
from .launching import FIXED, TOTAL_SIZES, compute_type, on_device, total
from .pairs import candidates, pair_metrics, pair_overlaps, walk_length, widened
from .rows import (
    CONTESTED,
    claim,
    claim_sizes,
    contest,
    empty_boxes,
    gt_rows,
    load_rows,
    owner,
    places,
    row_sizes,
    store_anchor_boxes,
)
from .topk import empty_list, index_of, is_among, is_taken, keep_best, list_sizes, merged, none, ordered

# ---- kernels


@triton.jit
def _prepare_kernel(
    boxes_ptr, boxes_stride, target_row_ptr, target_score_ptr, poison_ptr, dist_ptr, dist_stride, shapes, A,
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
    x1, y1, x2, y2 = (x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride
    store_anchor_boxes(image, offs_a, mask_a, boxes_ptr, boxes_stride, x1, y1, x2, y2)
    cell = image * A + offs_a
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
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the K highest metrics of BLOCK_G rows and claims their anchors in ``target_row``."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = widened(box, MIN_SIDE)
    length = walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)
    best, best_order = empty_list(BLOCK_G * PARTS, K, KP, DTYPE)
    start = 0
    while start < limit:
        nth = places(start, PARTS, BLOCK_P)
        anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
        metric = pair_metrics(info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE)
        key, order = ordered(metric, anchor)
        best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, none(key)), order)
        start += PARTS * BLOCK_P

    if PARTS > 1:
        best, best_order = merged(best, best_order, K, KP, DTYPE)
    claim(target_row_ptr, best_ptr, info[0] * A, index_of(best_order), offs_g, is_taken(best, K, KP))


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
    wide = widened(box, MIN_SIDE)
    length = walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        cell = info[0] * A + anchor
        mask = mask & (tl.load(target_row_ptr + cell, mask=mask, other=-1) >= CONTESTED)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
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
    wide = widened(box, MIN_SIDE)
    row = offs_g.to(tl.int32)[:, None]
    length = walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    limit = tl.max(length)

    best, best_order = empty_list(BLOCK_G, K, KP, DTYPE)
    if K > 0:
        start = 0
        while start < limit:
            nth = start + tl.arange(0, BLOCK_P)[None, :]
            anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
            mask = mask & (owner(info[0] * A + anchor, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
            overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
            metric = pair_metrics(
                info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE
            )
            key, order = ordered(metric, anchor)
            best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, none(key)), order)
            start += BLOCK_P

    max_metric = tl.zeros((BLOCK_G, 1), DTYPE)
    max_overlap = tl.zeros((BLOCK_G, 1), DTYPE)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        mask = mask & (owner(info[0] * A + anchor, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
            metric = pair_metrics(
                info[0], anchor, info[1], mask, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE
            )
            if K > 0:
                key, order = ordered(metric, anchor)
                mask = is_among(tl.where(metric > 0, key, none(key)), order, best, best_order)
            max_metric = tl.maximum(max_metric, tl.max(tl.where(mask, metric, 0.0), 1)[:, None])
            max_overlap = tl.maximum(max_overlap, tl.max(tl.where(mask, overlaps, 0.0), 1)[:, None])
        start += BLOCK_P

    score_sum = tl.zeros((BLOCK_G,), DTYPE)
    count = tl.zeros((BLOCK_G,), tl.int32)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = candidates(nth, length, wide, points_ptr, points_stride, shapes, STRIDES, IS_GRID, EPS, DTYPE)
        cell = info[0] * A + anchor
        is_mine = mask & (owner(cell, mask, target_row_ptr, best_ptr, IS_WIDE) == row)
        if tl.max(is_mine.to(tl.int32)) > 0:
            overlaps = pair_overlaps(info[0], anchor, is_mine, box, boxes_ptr, boxes_stride, DTYPE)
            metric = pair_metrics(
                info[0], anchor, info[1], is_mine, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE
            )
            stays = is_mine
            if K > 0:
                key, order = ordered(metric, anchor)
                stays = is_among(tl.where(metric > 0, key, none(key)), order, best, best_order)
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
    """One program adds up the rows' sums and counts; ``poison`` makes the sum NaN."""
    tl.store(score_sum_ptr, total(row_sum_ptr, N, DTYPE, BLOCK) + total(poison_ptr, programs, DTYPE, BLOCK))
    tl.store(num_fg_ptr, total(row_count_ptr, N, tl.int64, BLOCK))


# ---- operations


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
    boxes = empty_boxes(pred_dist, dtype)
    target_row = pred_dist.new_empty((batch_size, num_anchors), dtype=torch.int32)
    target_score = torch.empty_like(target_row, dtype=dtype)
    block_a, num_warps = decode_sizes(num_anchors, reg_max, 1024)  # 2048 spilled in float32 with the logits last
    grid = (triton.cdiv(num_anchors, block_a), batch_size)
    poisons = pred_dist.new_empty(grid[0] * grid[1], dtype=dtype)
    row_sum, row_count = poisons, target_row
    if target_row.numel():
        _prepare_kernel[grid](
            boxes, boxes.stride(), target_row, target_score, poisons, pred_dist, pred_dist.stride(), tuple(feat_shapes),
            num_anchors, STRIDES=tuple(strides), R=reg_max, RP=triton.next_power_of_2(reg_max), DTYPE=triton_dtype,
            BLOCK_A=block_a, num_warps=num_warps, **FIXED,
        )  # fmt: skip
        row_sum, row_count = _assign(
            target_row, target_score, pred_scores, boxes, boxes, gt_rows(image_index, labels, gt_boxes),
            tuple(feat_shapes), tuple(strides), True, topk, topk2, alpha, beta, min_box_side, 1e-9,
        )  # fmt: skip
    score_sum, num_fg = poisons.new_empty(()), labels.new_empty((), dtype=torch.int64)
    _sum_kernel[(1,)](
        score_sum, num_fg, row_sum, row_count, poisons, len(labels) if target_row.numel() else 0, len(poisons),
        DTYPE=triton_dtype, **TOTAL_SIZES, **FIXED,
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
    block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, 128, 4)
    grid = (triton.cdiv(num_rows, block_g),)
    sizes = (num_rows, batch_size, num_anchors)
    geometry = {
        "C": num_classes, "MIN_SIDE": min_box_side, "EPS": eps, "STRIDES": strides, "IS_GRID": is_grid,
        "DTYPE": compute_type(boxes.dtype), "BLOCK_G": block_g, "BLOCK_P": block_p, "num_warps": num_warps, **FIXED,
    }  # fmt: skip
    exponents = {"ALPHA": alpha, "BETA": beta}
    claim_geometry = {**geometry, **claim_sizes(num_rows, num_anchors, 32, 8)}
    _claim_kernel[grid](
        target_row, best, boxes, boxes.stride(), scores, scores.stride(), points, points.stride(), gt, gt_stride,
        shapes, *sizes, **list_sizes(topk, num_anchors), **exponents, **claim_geometry,
    )  # fmt: skip
    for is_tie_break in (False, True) if boxes.dtype == torch.float64 else (False,):
        _contest_kernel[grid](
            target_row, best, boxes, boxes.stride(), points, points.stride(), gt, gt_stride, shapes, *sizes,
            IS_TIE_BREAK=is_tie_break, **geometry,
        )  # fmt: skip
    _score_kernel[grid](
        row_sum, row_count, target_row, target_score, best, boxes, boxes.stride(), scores, scores.stride(),
        points, points.stride(), gt, gt_stride, shapes, *sizes,
        **list_sizes(topk2 or 0, num_anchors), **exponents, **geometry,
    )  # fmt: skip
    return row_sum, row_count
