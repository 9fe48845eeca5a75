"""Task-aligned assignment (TOOD, arXiv 2108.07755): one program a ground-truth row, no tensor of pairs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import State
from .boxes import expectation
from .claims import claim_owned, merge_parts, store_part
from .decode import load_angles, side_logits
from .fill import fill
from .grid import anchor_points, cell_centres, sized
from .oriented import oriented_box
from .packing import pack_rows
from .pairs import (
    candidate_area,
    candidates,
    is_inside,
    load_contested,
    load_truth,
    pair_metrics,
    pair_overlaps,
    walk_length,
)
from .reduce import total
from .rows import CONTESTED, Box, contest, list_length, store_anchor_boxes
from .topk import best_of, index_of, is_taken, keep_best, none, ordered


class Angles(NamedTuple):
    """Predicted angles (B, A, 1), and their gradient, None if it is not wanted; ``Tensor3``."""

    preds: Any
    grads: Any


class Result(NamedTuple):
    """What an assignment writes: row and target score (B, A) of every anchor, sum of scores and positives (N,) of every row."""

    row_ptr: Any
    score_ptr: Any
    row_sum_ptr: Any
    row_count_ptr: Any


# ---- kernels


@triton.jit
def _clear(result, state, image, offs_a, mask_a, A, is_first, HAS_SCORES: tl.constexpr, DTYPE: tl.constexpr):
    """Make anchors [n] of one image background; the first program of an image empties its list of contested anchors.

    Scores of background are 0, if anyone looks at them.
    """
    cell = image * A + offs_a
    tl.store(result.row_ptr + cell, tl.full(offs_a.shape, -1, tl.int32), mask=mask_a)
    if HAS_SCORES:
        tl.store(result.score_ptr + cell, tl.zeros(offs_a.shape, DTYPE), mask=mask_a)
    if is_first:
        tl.store(state.contested.count_ptr + image, 0)


@triton.jit(do_not_specialize=["N", "B"])
def _yolo11_prepare_kernel(
    boxes, result, state, poison_ptr, dist, angles, rows, targets, grid, height: tl.float64, width: tl.float64, N, B,
    RULE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, IS_FINAL: tl.constexpr, PACK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program decodes BLOCK_A anchors of one image to pixels and makes them background, none contested.

    Into ``poison`` (programs,) it writes 0, or NaN if one of its logits or angles is not finite. All together pack the ground
    truth. With ``angles`` boxes are oriented.
    """
    grid = sized(grid)
    STRIDES: tl.constexpr = RULE.STRIDES
    DTYPE: tl.constexpr = RULE.DTYPE
    image = tl.program_id(1).to(tl.int64)
    # Two anchors a thread, with all their bins: nothing changes hands.
    offs_a = tl.max_contiguous(tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A), 2)
    mask_a = offs_a < grid.A
    poison = tl.zeros((RP, BLOCK_A), DTYPE)
    left, poison = _poisoned_distance(dist, image, offs_a, mask_a, 0, poison, R, RP, DTYPE)
    top, poison = _poisoned_distance(dist, image, offs_a, mask_a, 1, poison, R, RP, DTYPE)
    right, poison = _poisoned_distance(dist, image, offs_a, mask_a, 2, poison, R, RP, DTYPE)
    bottom, poison = _poisoned_distance(dist, image, offs_a, mask_a, 3, poison, R, RP, DTYPE)
    x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
    if angles.preds is None:
        box = Box((x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride)
        store_anchor_boxes(boxes, image, offs_a, mask_a, box)
    else:
        angle = load_angles(angles.preds, image, offs_a, mask_a, DTYPE)
        poison += angle[None, :] * 0.0
        _store_turned(
            boxes, angles.grads, image, offs_a, mask_a, oriented_box(x, y, left, top, right, bottom, angle)[0], stride
        )
    _clear(result, state, image, offs_a, mask_a, grid.A, tl.program_id(0) == 0, IS_FINAL, DTYPE)
    tl.store(poison_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(poison))
    pack_rows(rows, targets, height, width, N, B, PACK, DTYPE, grid, RULE)


@triton.jit
def _store_turned(boxes, grads, image, offs_a, mask_a, box, stride):
    """Store boxes [n] of one image in pixels; the gradient of their angles, if there is one, begins as 0."""
    in_pixels = Box(box.x * stride, box.y * stride, box.w * stride, box.h * stride)
    store_anchor_boxes(boxes, image, offs_a, mask_a, in_pixels)
    offs_a = offs_a.to(tl.int64)
    tl.store(boxes.ptr + image * boxes.image + offs_a * boxes.anchor + 4 * boxes.channel, box.angle, mask=mask_a)
    if grads is not None:
        zeros = tl.zeros(offs_a.shape, grads.ptr.dtype.element_ty)
        tl.store(grads.ptr + image * grads.image + offs_a * grads.anchor, zeros, mask=mask_a)


@triton.jit
def _poisoned_distance(dist, image, offs_a, mask_a, side, poison, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side; ``poison`` [RP, n] becomes NaN where a logit is not finite."""
    logits = side_logits(dist, image, offs_a, mask_a, side, R, RP, DTYPE)
    bins = tl.arange(0, RP)[:, None]
    distance = expectation(logits, bins.to(DTYPE), R)[1]
    if R != RP:
        logits = tl.where(bins < R, logits, 0.0)
    return distance, tl.fma(logits, 0.0, poison)


@triton.jit(do_not_specialize=["N", "B"])
def _background_kernel(result, state, rows, targets, A, N, B, PACK: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """A program makes BLOCK_A anchors of one image background, none contested. All together pack the ground truth."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    _clear(result, state, image, offs_a, offs_a < A, A, tl.program_id(0) == 0, True, DTYPE)
    pack_rows(rows, targets, 0.0, 0.0, N, B, PACK, DTYPE)


@triton.jit
def _fill_by_last(zeros, part, parts):
    """Have the last parts of all rows fill memory: few rows have so many."""
    filling = tl.minimum(parts, 4)
    if part >= parts - filling:
        nth = (part - (parts - filling)) * tl.num_programs(0) + tl.program_id(0)
        fill(zeros.ptr, 0.0, zeros.size, nth, filling * tl.num_programs(0), 4096)


@triton.jit
def _candidate_keys(nth, truth, wide, length, boxes, scores, points, grid, RULE: tl.constexpr):
    """Key and order of the metrics of the ``nth`` anchors [g, n] of each row's walk, ``none`` where there is no candidate."""
    anchor, mask = candidates(nth, length, wide, points, grid, RULE)
    overlaps = pair_overlaps(truth, anchor, mask, boxes, RULE)
    metric = pair_metrics(truth, anchor, mask, overlaps, scores, RULE)
    key, order = ordered(metric, anchor)
    return tl.where(metric > 0, key, none(key)), order


@triton.jit(do_not_specialize=["N"])
def _task_aligned_claim_kernel(
    lists, zeros, boxes, scores, points, rows, grid, N, RULE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the K highest metrics in one of at most PARTS parts of the walks of BLOCK_G rows.

    Each part has every so-manieth tile of BLOCK_P anchors. All together fill ``zeros``, if there are any.
    """
    grid = sized(grid)
    part, parts = tl.program_id(1), tl.num_programs(1)
    if zeros is not None:
        _fill_by_last(zeros, part, parts)
    start = part * BLOCK_P
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    length = walk_length(rows, offs_g, N, grid, RULE)
    limit = tl.max(length)
    if start < limit:
        truth = load_truth(rows, offs_g, N, RULE)
        wide = candidate_area(truth.box, RULE)
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        key, order = _candidate_keys(nth, truth, wide, length, boxes, scores, points, grid, RULE)
        best, best_order = best_of(key, order, K, KP, RULE.DTYPE)
        nth += parts * BLOCK_P
        start += parts * BLOCK_P
        while start < limit:
            key, order = _candidate_keys(nth, truth, wide, length, boxes, scores, points, grid, RULE)
            best, best_order = keep_best(best, best_order, key, order)
            nth += parts * BLOCK_P
            start += parts * BLOCK_P
        store_part(lists, truth.row, truth.row < N, part, best, best_order, PARTS, K, KP)


@triton.jit(do_not_specialize=["N", "parts"])
def _task_aligned_merge_kernel(
    claims_ptr, lists, state, order_ptr, rows, grid, N, parts, RULE: tl.constexpr, PARTS: tl.constexpr, PART_P: tl.constexpr,
    PART_K: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program merges the lists of the parts of BLOCK_G rows, and claims the anchors of the K highest metrics.

    It keeps them in ``claims`` (N, K), -1 where there are fewer.
    """
    grid = sized(grid)
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    truth, length = load_truth(rows, offs_g, N, RULE), walk_length(rows, offs_g, N, grid, RULE)
    num_parts = tl.minimum(tl.cdiv(length, PART_P), parts)
    best, best_order = merge_parts(lists, truth.row, num_parts, PARTS, PART_K, K, KP, RULE.DTYPE, BLOCK_P)
    anchor, is_claim = index_of(best_order), is_taken(best, K, KP)
    place = tl.arange(0, KP)[None, :]
    ptr = claims_ptr + truth.row.to(tl.int64) * K + place
    tl.store(ptr, tl.where(is_claim, anchor, -1), mask=(truth.row < N) & (place < K))
    claim_owned(state, order_ptr, truth, anchor, is_claim, grid.A)


@triton.jit(do_not_specialize=["N"])
def _task_aligned_contest_kernel(
    state, order_ptr, boxes, points, rows, grid, N, RULE: tl.constexpr, IS_TIE_BREAK: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested candidates of BLOCK_G rows to their overlap."""
    grid = sized(grid)
    IS_WIDE: tl.constexpr = tl.float64 == RULE.DTYPE
    STRIDES: tl.constexpr = RULE.STRIDES
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    truth, length = load_truth(rows, offs_g, N, RULE), walk_length(rows, offs_g, N, grid, RULE)
    wide = candidate_area(truth.box, RULE)
    num_contested = list_length(state.contested, truth)
    limit = tl.max(tl.minimum(length, num_contested))
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = load_contested(nth, length, num_contested, truth, wide, state.contested, grid, RULE)
        x, y = anchor_points(anchor, mask, points, grid, STRIDES, RULE.IS_GRID, RULE.DTYPE)
        cell = truth.image * grid.A + anchor
        mask = mask & is_inside(x, y, wide, RULE)
        mask = mask & (tl.load(state.row_ptr + cell, mask=mask, other=-1) >= CONTESTED)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = pair_overlaps(truth, anchor, mask, boxes, RULE)
            # In float64 the states say who claims; what breaks ties has a place of its own.
            contest(State(order_ptr, state.best_ptr, state.contested), truth, cell, overlaps, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


@triton.jit(do_not_specialize=["N", "B", "programs"])
def _yolo11_sum_kernel(
    sums_ptr, num_fg_ptr, result, poison_ptr, N, B, programs, IS_NORMALISER: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the rows' sums and counts; ``poison`` makes the sum NaN.

    Into ``sums`` (2,) go the sum of the target scores and B; as a normaliser, at least 1.
    """
    score_sum = total(result.row_sum_ptr, N, DTYPE, BLOCK) + total(poison_ptr, programs, DTYPE, BLOCK)
    if IS_NORMALISER:
        score_sum = tl.where(score_sum < 1, 1.0, score_sum).to(DTYPE)  # NaN stays NaN
    tl.store(sums_ptr, score_sum)
    tl.store(sums_ptr + 1, tl.full((), B, DTYPE))
    tl.store(num_fg_ptr, total(result.row_count_ptr, N, tl.int64, BLOCK))
