"""Target scores of task-aligned assignment: what a row owns, of what it claimed and of what is contested."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .grid import sized
from .pairs import (
    candidate_area,
    load_contested,
    load_truth,
    pair_metrics,
    pair_overlaps,
    walk_length,
)
from .rows import CONTESTED, list_length, winner
from .topk import empty_list, is_among, keep_best, none, ordered

_UNIT: tl.constexpr = tl.constexpr(float(1 << 44))
"""Of sums of target scores, which are at most 1, so that half a million of them fit an int64."""


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
def winning_row(state, order_ptr, cell, is_contested, IS_WIDE: tl.constexpr):
    """Rows that have the best of contested cells."""
    order = 0
    if IS_WIDE:
        order = tl.load(order_ptr + cell, mask=is_contested, other=0)
    return winner(state, cell, order, is_contested, IS_WIDE)


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
def _keep_best_pairs(best, best_order, pairs):
    """Merge pairs into the lists [g, KP] of the highest metrics."""
    key, order = ordered(pairs.metric, pairs.anchor)
    return keep_best(best, best_order, tl.where(pairs.metric > 0, key, none(key)), order)


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
    grid = sized(grid)
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    truth = load_truth(rows, offs_g, N, RULE)
    wide = candidate_area(truth.box, RULE)
    length, num_contested = walk_length(rows, offs_g, N, grid, RULE), list_length(state.contested, truth)
    owned = Owned(truth, wide, length, num_contested, claims_ptr, state, order_ptr)
    limit = CLAIMS + tl.max(tl.minimum(length, num_contested))
    nth = tl.arange(0, BLOCK_P)[None, :]
    pairs = _owned_pairs(nth, owned, boxes, scores, grid, RULE, CLAIMS)
    best, best_order = empty_list(BLOCK_G, K, KP, RULE.DTYPE)
    if K > 0:
        best, best_order = _keep_best_pairs(best, best_order, pairs)
        start = BLOCK_P
        while start < limit:
            others = _owned_pairs(start + nth, owned, boxes, scores, grid, RULE, CLAIMS)
            best, best_order = _keep_best_pairs(best, best_order, others)
            start += BLOCK_P
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
