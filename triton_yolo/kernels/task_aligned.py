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
from .grid import anchor_points, cell_centres
from .launching import FIXED, TOTAL_SIZES, compute_type, on_device, scalar, total
from .pairs import candidates, is_inside, load_contested, pair_metrics, pair_overlaps, walk_length, widened
from .rows import (
    CONTESTED,
    claim,
    claim_sizes,
    contest,
    empty_boxes,
    gt_rows,
    list_length,
    load_rows,
    new_list,
    places,
    row_sizes,
    store_anchor_boxes,
    winner,
)
from .topk import empty_list, index_of, is_among, is_taken, keep_best, list_sizes, merged, none, ordered

_UNIT: tl.constexpr = tl.constexpr(float(1 << 44))
"""Of sums of target scores, which are at most 1, so that half a million of them fit an int64."""

# ---- kernels


@triton.jit
def _prepare_kernel(
    boxes_ptr, boxes_stride, target_row_ptr, target_score_ptr, num_contested_ptr, poison_ptr, dist_ptr, dist_stride,
    shapes, A, STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program decodes BLOCK_A anchors of one image to pixels and makes them background, none contested.

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
    if tl.program_id(0) == 0:
        tl.store(num_contested_ptr + image, 0)


@triton.jit
def _poisoned_distance(dist_ptr, dist_stride, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side, and the sum of its logits times 0."""
    logits = side_logits(dist_ptr, dist_stride, offs_a, mask_a, side, R, RP, DTYPE)
    bins = tl.arange(0, RP)[:, None]
    distance = expectation(logits, bins.to(DTYPE), R)[1]
    return distance, tl.sum(tl.where(bins < R, logits * 0.0, 0.0), 0)


@triton.jit
def _claim_kernel(
    claims_ptr, contested, target_row_ptr, best_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride,
    points_ptr, points_stride, gt, gt_stride, shapes, N, B, A,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, MIN_SIDE: tl.constexpr,
    EPS: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the K highest metrics of BLOCK_G rows and claims their anchors in ``target_row``.

    It keeps them in ``claims`` (N, K), -1 where there are fewer.
    """
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
    anchor, is_claim = index_of(best_order), is_taken(best, K, KP)
    place = tl.arange(0, KP)[None, :]
    ptr = claims_ptr + offs_g.to(tl.int64)[:, None] * K + place
    tl.store(ptr, tl.where(is_claim, anchor, -1), mask=(offs_g < N)[:, None] & (place < K))
    claim(target_row_ptr, best_ptr, contested, info[0], anchor, offs_g, is_claim, A)


@triton.jit
def _contest_kernel(
    target_row_ptr, best_ptr, contested, boxes_ptr, boxes_stride, points_ptr, points_stride, gt, gt_stride, shapes, N, B, A,
    IS_TIE_BREAK: tl.constexpr, C: tl.constexpr, MIN_SIDE: tl.constexpr, EPS: tl.constexpr, STRIDES: tl.constexpr,
    IS_GRID: tl.constexpr, DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested candidates of BLOCK_G rows to their overlap."""
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = widened(box, MIN_SIDE)
    length = walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    num_contested = list_length(contested, info[0], info[2])
    limit = tl.max(tl.minimum(length, num_contested))
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = load_contested(nth, length, num_contested, info[0], wide, contested, shapes, A, STRIDES, IS_GRID, DTYPE)
        x, y = anchor_points(anchor, mask, points_ptr, points_stride, shapes, STRIDES, IS_GRID, DTYPE)
        cell = info[0] * A + anchor
        mask = mask & is_inside(x, y, wide, EPS)
        mask = mask & (tl.load(target_row_ptr + cell, mask=mask, other=-1) >= CONTESTED)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = pair_overlaps(info[0], anchor, mask, box, boxes_ptr, boxes_stride, DTYPE)
            contest(target_row_ptr, best_ptr, cell, overlaps, offs_g, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


@triton.jit
def _owned_pairs(
    nth, row, info, box, wide, length, num_contested, claims_ptr, contested, target_row_ptr, best_ptr, boxes_ptr, boxes_stride,
    scores_ptr, scores_stride, shapes, A, CLAIMS: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The ``nth`` anchors [g, n] that rows [g, 1] may own, and whether they do; their overlap and metric, 0 where they do not.

    First come a row's claims, then what is contested. A contested anchor counts among the latter, even if the row claimed it.
    """
    is_claim = nth < CLAIMS
    anchor, is_ours = load_contested(
        nth - CLAIMS, length, num_contested, info[0], wide, contested, shapes, A, STRIDES, IS_GRID, DTYPE
    )
    claimed = tl.load(claims_ptr + row.to(tl.int64) * CLAIMS + nth, mask=info[2] & is_claim, other=-1)
    anchor, is_ours = tl.where(is_claim, claimed, anchor), tl.where(is_claim, claimed >= 0, is_ours)
    cell = info[0] * A + anchor
    state = tl.load(target_row_ptr + cell, mask=is_ours, other=-1)
    is_contested = is_ours & (state >= CONTESTED)
    won = is_contested & (winner(cell, state, is_contested, best_ptr, tl.float64 == DTYPE) == row)
    is_ours = tl.where(is_claim, is_ours & (state == row), won)
    overlaps, metric = tl.zeros(cell.shape, DTYPE), tl.zeros(cell.shape, DTYPE)
    if tl.max(is_ours.to(tl.int32)) > 0:
        overlaps = pair_overlaps(info[0], anchor, is_ours, box, boxes_ptr, boxes_stride, DTYPE)
        metric = pair_metrics(
            info[0], anchor, info[1], is_ours, overlaps, scores_ptr, scores_stride, IS_GRID, ALPHA, BETA, DTYPE
        )
    return anchor, is_ours, overlaps, metric


@triton.jit
def _score_kernel(
    row_sum_ptr, row_count_ptr, target_row_ptr, target_score_ptr, best_ptr, claims_ptr, contested,
    boxes_ptr, boxes_stride, scores_ptr, scores_stride, gt, gt_stride, shapes, N, B, A,
    CLAIMS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    MIN_SIDE: tl.constexpr, EPS: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program settles the anchors of BLOCK_G rows: it writes row and target score where they stay positive.

    With K > 0 only the K highest metrics of a row stay, the others become background again. Only the row that owns an anchor
    writes there; others may read it before or after, and see that it is not theirs either way. Each row's sum of target
    scores and number of positives go to ``row_sum`` and ``row_count`` (N,).
    """
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    wide = widened(box, MIN_SIDE)
    row = offs_g.to(tl.int32)[:, None]
    length = walk_length(info[2], wide, shapes, A, STRIDES, IS_GRID)
    num_contested = list_length(contested, info[0], info[2])
    limit = CLAIMS + tl.max(tl.minimum(length, num_contested))

    best, best_order = empty_list(BLOCK_G, K, KP, DTYPE)
    if K > 0:
        start = 0
        while start < limit:
            anchor, is_ours, overlaps, metric = _owned_pairs(
                start + tl.arange(0, BLOCK_P)[None, :], row, info, box, wide, length, num_contested, claims_ptr, contested,
                target_row_ptr, best_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, shapes, A,
                CLAIMS, ALPHA, BETA, STRIDES, IS_GRID, DTYPE,
            )  # fmt: skip
            key, order = ordered(metric, anchor)
            best, best_order = keep_best(best, best_order, tl.where(metric > 0, key, none(key)), order)
            start += BLOCK_P

    max_metric = tl.zeros((BLOCK_G, 1), DTYPE)
    max_overlap = tl.zeros((BLOCK_G, 1), DTYPE)
    start = 0
    while start < limit:
        anchor, is_ours, overlaps, metric = _owned_pairs(
            start + tl.arange(0, BLOCK_P)[None, :], row, info, box, wide, length, num_contested, claims_ptr, contested,
            target_row_ptr, best_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, shapes, A,
            CLAIMS, ALPHA, BETA, STRIDES, IS_GRID, DTYPE,
        )  # fmt: skip
        if K > 0:
            key, order = ordered(metric, anchor)
            is_ours = is_among(tl.where(metric > 0, key, none(key)), order, best, best_order)
        max_metric = tl.maximum(max_metric, tl.max(tl.where(is_ours, metric, 0.0), 1)[:, None])
        max_overlap = tl.maximum(max_overlap, tl.max(tl.where(is_ours, overlaps, 0.0), 1)[:, None])
        start += BLOCK_P

    score_sum = tl.zeros((BLOCK_G,), tl.int64)
    count = tl.zeros((BLOCK_G,), tl.int32)
    start = 0
    while start < limit:
        anchor, is_ours, overlaps, metric = _owned_pairs(
            start + tl.arange(0, BLOCK_P)[None, :], row, info, box, wide, length, num_contested, claims_ptr, contested,
            target_row_ptr, best_ptr, boxes_ptr, boxes_stride, scores_ptr, scores_stride, shapes, A,
            CLAIMS, ALPHA, BETA, STRIDES, IS_GRID, DTYPE,
        )  # fmt: skip
        stays = is_ours
        if K > 0:
            key, order = ordered(metric, anchor)
            stays = is_among(tl.where(metric > 0, key, none(key)), order, best, best_order)
        score = tl.where(stays, metric * max_overlap / (max_metric + EPS), 0.0)
        cell = info[0] * A + anchor
        tl.store(target_row_ptr + cell, tl.where(stays, row, -1), mask=is_ours)
        tl.store(target_score_ptr + cell, score, mask=is_ours)
        # Added up as integers, since the order of a list is any.
        score_sum += tl.sum((score * _UNIT).to(tl.int64), 1)
        count += tl.sum(stays.to(tl.int32), 1)
        start += BLOCK_P
    tl.store(row_sum_ptr + offs_g, score_sum.to(DTYPE) / _UNIT, mask=offs_g < N)
    tl.store(row_count_ptr + offs_g, count, mask=offs_g < N)


@triton.jit
def _sum_kernel(
    sums_ptr, num_fg_ptr, row_sum_ptr, row_count_ptr, poison_ptr, N, programs, B,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the rows' sums and counts; ``poison`` makes the sum NaN. Behind it goes the batch size."""
    tl.store(sums_ptr + 1, scalar(B, DTYPE))
    tl.store(sums_ptr, total(row_sum_ptr, N, DTYPE, BLOCK) + total(poison_ptr, programs, DTYPE, BLOCK))
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
    contested = new_list(target_row)
    contested[1].zero_()
    if shape.numel():
        _assign(
            target_row, target_score, contested, scores, boxes, points, gt_rows(image_index, labels, gt_boxes),
            (1, 1), (1.0,), False, topk, topk2, alpha, beta, min_box_side, eps,
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
    contested = new_list(target_row)
    row_sum, row_count = poisons, target_row
    if target_row.numel():
        _prepare_kernel[grid](
            boxes, boxes.stride(), target_row, target_score, contested[1], poisons, pred_dist, pred_dist.stride(),
            tuple(feat_shapes), num_anchors, STRIDES=tuple(strides), R=reg_max, RP=triton.next_power_of_2(reg_max),
            DTYPE=triton_dtype, BLOCK_A=block_a, num_warps=num_warps, **FIXED,
        )  # fmt: skip
        row_sum, row_count = _assign(
            target_row, target_score, contested, pred_scores, boxes, boxes, gt_rows(image_index, labels, gt_boxes),
            tuple(feat_shapes), tuple(strides), True, topk, topk2, alpha, beta, min_box_side, 1e-9,
        )  # fmt: skip
    sums, num_fg = poisons.new_empty(2), labels.new_empty((), dtype=torch.int64)
    _sum_kernel[(1,)](
        sums, num_fg, row_sum, row_count, poisons, len(labels) if target_row.numel() else 0, len(poisons), batch_size,
        DTYPE=triton_dtype, **TOTAL_SIZES, **FIXED,
    )  # fmt: skip
    return target_row, target_score, sums, num_fg


def _assign(
    target_row: Tensor, target_score: Tensor, contested: tuple[Tensor, Tensor], scores: Tensor, boxes: Tensor, points: Tensor,
    rows: tuple[Any, Any], shapes: tuple[int, ...], strides: tuple[float, ...], is_grid: bool,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill ``target_row`` and ``target_score``, background so far, with none ``contested``; return each row's sum and count."""
    batch_size, num_anchors, num_classes = scores.shape
    (gt, gt_stride), num_rows = rows, len(rows[0][0])
    row_sum = target_score.new_empty(num_rows)
    row_count = target_row.new_empty(num_rows)
    if num_rows == 0:
        return row_sum, row_count
    best = target_row.new_empty(target_row.shape, dtype=torch.int64)
    block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, 64, 2)
    grid = (triton.cdiv(num_rows, block_g),)
    sizes = (num_rows, batch_size, num_anchors)
    geometry = {
        "C": num_classes, "MIN_SIDE": min_box_side, "EPS": eps, "STRIDES": strides, "IS_GRID": is_grid,
        "DTYPE": compute_type(boxes.dtype), "BLOCK_G": block_g, "BLOCK_P": block_p, "num_warps": num_warps, **FIXED,
    }  # fmt: skip
    exponents = {"ALPHA": alpha, "BETA": beta}
    claimed = list_sizes(topk, num_anchors)
    claims = target_row.new_empty(num_rows, claimed["K"])
    _claim_kernel[grid](
        claims, contested, target_row, best, boxes, boxes.stride(), scores, scores.stride(), points, points.stride(),
        gt, gt_stride, shapes, *sizes,
        **claimed, **exponents, **{**geometry, **claim_sizes(num_rows, num_anchors, 32, 8)},
    )  # fmt: skip
    for is_tie_break in (False, True) if boxes.dtype == torch.float64 else (False,):
        _contest_kernel[grid](
            target_row, best, contested, boxes, boxes.stride(), points, points.stride(), gt, gt_stride, shapes, *sizes,
            IS_TIE_BREAK=is_tie_break, **geometry,
        )  # fmt: skip
    _score_kernel[grid](
        row_sum, row_count, target_row, target_score, best, claims, contested, boxes, boxes.stride(), scores, scores.stride(),
        gt, gt_stride, shapes, *sizes,
        CLAIMS=claimed["K"], **list_sizes(topk2 or 0, num_anchors), **exponents, **geometry,
    )  # fmt: skip
    return row_sum, row_count
