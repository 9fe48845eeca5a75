"""Task-aligned assignment (TOOD, arXiv 2108.07755): one program a ground-truth row, no tensor of pairs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import State
from .boxes import expectation
from .claims import claim_owned, merge_parts, store_part, winning_row
from .decode import side_logits
from .fill import fill_by_last
from .grid import anchor_points, cell_centres
from .pairs import (
    candidates,
    is_inside,
    load_contested,
    longest_walk,
    pair_metrics,
    pair_overlaps,
    walk_length,
    widened,
)
from .reduce import total
from .rows import CONTESTED, Box, contest, list_length, load_rows, pack_rows, store_anchor_boxes
from .topk import best_of, empty_list, index_of, is_among, is_taken, keep_best, none, ordered

_UNIT: tl.constexpr = tl.constexpr(float(1 << 44))
"""Of sums of target scores, which are at most 1, so that half a million of them fit an int64."""


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
    boxes, result, state, poison_ptr, dist, rows, targets, grid, height: tl.float64, width: tl.float64, N, B,
    STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, IS_FINAL: tl.constexpr, PACK: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program decodes BLOCK_A anchors of one image to pixels and makes them background, none contested.

    Into ``poison`` (programs,) it writes 0, or NaN if one of its logits is not finite. All together pack the ground truth.
    """
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
    box = Box((x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride)
    store_anchor_boxes(boxes, image, offs_a, mask_a, box)
    _clear(result, state, image, offs_a, mask_a, grid.A, tl.program_id(0) == 0, IS_FINAL, DTYPE)
    tl.store(poison_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(poison))
    pack_rows(rows, targets, height, width, N, B, PACK, DTYPE)


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
    """A program finds the K highest metrics in one part of the walks of BLOCK_G rows, every PARTS-th tile of BLOCK_P anchors.

    All together fill ``zeros``, if there are any.
    """
    part = tl.program_id(1)
    if zeros is not None:
        fill_by_last(zeros, part, PARTS, min(PARTS, 4))
    start = part * BLOCK_P
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    if start <= tl.max(longest_walk(rows, offs_g, N, grid, RULE)):
        truth = load_rows(rows, offs_g, N, RULE.DTYPE)
        wide = widened(truth.box, RULE.MIN_SIDE)
        length = walk_length(truth, wide, grid, RULE)
        limit = tl.max(length)
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        key, order = _candidate_keys(nth, truth, wide, length, boxes, scores, points, grid, RULE)
        best, best_order = best_of(key, order, K, KP, RULE.DTYPE)
        nth += PARTS * BLOCK_P
        start += PARTS * BLOCK_P
        while start < limit:
            key, order = _candidate_keys(nth, truth, wide, length, boxes, scores, points, grid, RULE)
            best, best_order = keep_best(best, best_order, key, order)
            nth += PARTS * BLOCK_P
            start += PARTS * BLOCK_P
        store_part(lists, truth.row, truth.row < N, part, best, best_order, PARTS, K, KP)


@triton.jit(do_not_specialize=["N"])
def _task_aligned_merge_kernel(
    claims_ptr, lists, state, order_ptr, rows, grid, N, RULE: tl.constexpr, PARTS: tl.constexpr, PART_P: tl.constexpr,
    PART_K: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program merges the lists of the parts of BLOCK_G rows, and claims the anchors of the K highest metrics.

    It keeps them in ``claims`` (N, K), -1 where there are fewer.
    """
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    length = walk_length(truth, widened(truth.box, RULE.MIN_SIDE), grid, RULE)
    num_parts = tl.minimum(tl.cdiv(length, PART_P), PARTS)
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
    IS_WIDE: tl.constexpr = tl.float64 == RULE.DTYPE
    STRIDES: tl.constexpr = RULE.STRIDES
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    wide = widened(truth.box, RULE.MIN_SIDE)
    length = walk_length(truth, wide, grid, RULE)
    num_contested = list_length(state.contested, truth)
    limit = tl.max(tl.minimum(length, num_contested))
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor, mask = load_contested(nth, length, num_contested, truth, wide, state.contested, grid, RULE)
        x, y = anchor_points(anchor, mask, points, grid, STRIDES, RULE.IS_GRID, RULE.DTYPE)
        cell = truth.image * grid.A + anchor
        mask = mask & is_inside(x, y, wide, RULE.EPS)
        mask = mask & (tl.load(state.row_ptr + cell, mask=mask, other=-1) >= CONTESTED)
        if tl.max(mask.to(tl.int32)) > 0:
            overlaps = pair_overlaps(truth, anchor, mask, boxes, RULE)
            # In float64 the states say who claims; what breaks ties has a place of its own.
            contest(State(order_ptr, state.best_ptr, state.contested), truth, cell, overlaps, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


class Pairs(NamedTuple):
    """Anchors [g, n] that rows may own, whether they do, overlap and metric, 0 where they do not."""

    anchor: Any
    is_ours: Any
    overlaps: Any
    metric: Any


class Owned(NamedTuple):
    """What rows [g, 1] may own: claims, then what is contested; as far as it takes to find them, see ``_owned_pairs``."""

    truth: Any
    wide: Any
    length: Any
    num_contested: Any
    claims_ptr: Any
    state: Any
    order_ptr: Any


@triton.jit
def _owned_pairs(nth, owned, boxes, scores, grid, RULE: tl.constexpr, CLAIMS: tl.constexpr):
    """The ``nth`` anchors [g, n] that rows [g, 1] may own.

    First come a row's claims, then what is contested. A contested anchor counts among the latter, even if the row claimed it.
    """
    truth, state = owned.truth, owned.state
    is_claim = nth < CLAIMS
    anchor, is_ours = load_contested(
        nth - CLAIMS, owned.length, owned.num_contested, truth, owned.wide, state.contested, grid, RULE
    )
    claimed = tl.load(owned.claims_ptr + truth.row.to(tl.int64) * CLAIMS + nth, mask=truth.is_gt & is_claim, other=-1)
    anchor, is_ours = tl.where(is_claim, claimed, anchor), tl.where(is_claim, claimed >= 0, is_ours)
    cell = truth.image * grid.A + anchor
    owner = tl.load(state.row_ptr + cell, mask=is_ours, other=-1)
    is_contested = is_ours & (owner >= CONTESTED)
    won = is_contested & (winning_row(state, owned.order_ptr, cell, is_contested, tl.float64 == RULE.DTYPE) == truth.row)
    is_ours = tl.where(is_claim, is_ours & (owner == truth.row), won)
    overlaps, metric = tl.zeros(cell.shape, RULE.DTYPE), tl.zeros(cell.shape, RULE.DTYPE)
    if tl.max(is_ours.to(tl.int32)) > 0:
        overlaps = pair_overlaps(truth, anchor, is_ours, boxes, RULE)
        metric = pair_metrics(truth, anchor, is_ours, overlaps, scores, RULE)
    return Pairs(anchor, is_ours, overlaps, metric)


@triton.jit
def _best_owned(
    limit, owned, boxes, scores, grid, RULE: tl.constexpr, CLAIMS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """List [g, KP] of the K highest metrics among what rows own."""
    best, best_order = empty_list(owned.length.shape[0], K, KP, RULE.DTYPE)
    start = 0
    while start < limit:
        pairs = _owned_pairs(start + tl.arange(0, BLOCK_P)[None, :], owned, boxes, scores, grid, RULE, CLAIMS)
        key, order = ordered(pairs.metric, pairs.anchor)
        best, best_order = keep_best(best, best_order, tl.where(pairs.metric > 0, key, none(key)), order)
        start += BLOCK_P
    return best, best_order


class Largest(NamedTuple):
    """Largest metric and overlap [g, 1] of what stays with a row."""

    metric: Any
    overlap: Any


@triton.jit
def _largest(pairs, stays):
    metric, overlap = tl.where(stays, pairs.metric, 0.0), tl.where(stays, pairs.overlaps, 0.0)
    return Largest(tl.max(metric, 1)[:, None], tl.max(overlap, 1)[:, None])


@triton.jit
def _settle(result, owned, pairs, stays, largest, A, RULE: tl.constexpr, IS_FINAL: tl.constexpr):
    """Write the target scores of what stays with rows, and who is background again; return sums [g] and counts [g].

    Final rows are written too. Only the row that owns an anchor writes there; others may read it before or after, and see that
    it is not theirs either way.
    """
    score = tl.where(stays, pairs.metric * largest.overlap / (largest.metric + RULE.EPS), 0.0)
    cell = owned.truth.image * A + pairs.anchor
    is_written = pairs.is_ours if IS_FINAL else pairs.is_ours & (stays == 0)
    tl.store(result.row_ptr + cell, tl.where(stays, owned.truth.row, -1), mask=is_written)
    tl.store(result.score_ptr + cell, score, mask=pairs.is_ours)
    # Added up as integers, since the order of a list is any.
    return tl.sum((score * _UNIT).to(tl.int64), 1), tl.sum(stays.to(tl.int32), 1)


@triton.jit(do_not_specialize=["N"])
def _task_aligned_score_kernel(
    result, state, order_ptr, claims_ptr, boxes, scores, rows, grid, N, RULE: tl.constexpr, IS_FINAL: tl.constexpr,
    CLAIMS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program settles the anchors of BLOCK_G rows: it writes target scores, and with ``IS_FINAL`` the rows, where they stay.

    With K > 0 only the K highest metrics of a row stay, the others become background again. What fits one tile is worked out
    once.
    """
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    truth = load_rows(rows, offs_g, N, RULE.DTYPE)
    wide = widened(truth.box, RULE.MIN_SIDE)
    length, num_contested = walk_length(truth, wide, grid, RULE), list_length(state.contested, truth)
    owned = Owned(truth, wide, length, num_contested, claims_ptr, state, order_ptr)
    limit = CLAIMS + tl.max(tl.minimum(length, num_contested))
    best, best_order = empty_list(BLOCK_G, K, KP, RULE.DTYPE)
    if K > 0:
        best, best_order = _best_owned(limit, owned, boxes, scores, grid, RULE, CLAIMS, K, KP, BLOCK_P)

    nth = tl.arange(0, BLOCK_P)[None, :]
    pairs = _owned_pairs(nth, owned, boxes, scores, grid, RULE, CLAIMS)
    stays = _stays(pairs, best, best_order, K)
    largest = _largest(pairs, stays)
    start = BLOCK_P
    while start < limit:
        more = _owned_pairs(start + nth, owned, boxes, scores, grid, RULE, CLAIMS)
        of_more = _largest(more, _stays(more, best, best_order, K))
        largest = Largest(tl.maximum(largest.metric, of_more.metric), tl.maximum(largest.overlap, of_more.overlap))
        start += BLOCK_P
    score_sum, count = _settle(result, owned, pairs, stays, largest, grid.A, RULE, IS_FINAL)
    start = BLOCK_P
    while start < limit:
        rest = _owned_pairs(start + nth, owned, boxes, scores, grid, RULE, CLAIMS)
        rest_stays = _stays(rest, best, best_order, K)
        rest_sum, rest_count = _settle(result, owned, rest, rest_stays, largest, grid.A, RULE, IS_FINAL)
        score_sum, count = score_sum + rest_sum, count + rest_count
        start += BLOCK_P
    tl.store(result.row_sum_ptr + offs_g, score_sum.to(RULE.DTYPE) / _UNIT, mask=offs_g < N)
    tl.store(result.row_count_ptr + offs_g, count, mask=offs_g < N)


@triton.jit
def _stays(pairs, best, best_order, K: tl.constexpr):
    """Which pairs stay positive: all that are owned or, with K > 0, those in the list of the best."""
    stays = pairs.is_ours
    if K > 0:
        key, order = ordered(pairs.metric, pairs.anchor)
        stays = is_among(tl.where(pairs.metric > 0, key, none(key)), order, best, best_order)
    return stays


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
