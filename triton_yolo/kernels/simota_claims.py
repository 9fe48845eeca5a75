"""Claims of SimOTA (arXiv 2107.08430): which anchors each row of ground truth takes, in parts of the members, merged by row.

A feasible pair of a cheap member costs less than any infeasible one, whatever its class and IoU: a row with k of those in its
own centre region needs the IoUs of the other members, for k, but not their costs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .claims import claim_owned, merge_parts, store_part
from .members import MAX_DYNAMIC_K, SPREAD, cells_of, in_box, in_centre, load_boxes, load_truth
from .rows import list_length, load_listed, load_rows
from .simota_cost import pair_costs, pair_iou
from .topk import best_of, bits_of, index_of, none, ordered, rank, value_of

SLOTS: tl.constexpr = tl.constexpr(16)  # places a row for its claims, of which there are at most 10
_LIST: tl.constexpr = tl.constexpr(32)  # a place a lane
_FEW: tl.constexpr = tl.constexpr(3)  # of the largest IoUs at one of so many places: hardly ever are there more
_MORE: tl.constexpr = tl.constexpr(6)  # by chance there never are
_UNIT: tl.constexpr = tl.constexpr(float(1 << 52))


class Split(NamedTuple):
    """Constants: members a part, and the most parts there can be, of those whose IoUs are looked at, and of those whose costs.

    Of the listed IoUs no place of a merge meets more than ``IOU_DEPTH``, if ten do not suffice.
    """

    IOU_P: int
    IOU_PARTS: int
    IOU_DEPTH: int
    COST_P: int
    COST_PARTS: int


@triton.jit
def costs_anywhere(members, preds, truth, centre, anchor, mask, box, grid, RULE: tl.constexpr):
    """Cost of rows [g, 1] with members [g, n] wherever they are, whose boxes are given."""
    cell = cells_of(anchor, mask, preds, grid, RULE)
    is_feasible = in_centre(cell, centre, RULE.RADIUS)
    if RULE.HAS_BOX:
        is_feasible = is_feasible & in_box(cell, truth.box)
    background = tl.load(members.cost_ptr + truth.image * grid.A + anchor, mask=mask, other=0.0)
    return pair_costs(background, preds, truth, anchor, mask, pair_iou(truth.box, box), is_feasible, RULE.DTYPE)


@triton.jit
def _no_tensors():
    return ()


@triton.jit
def _load_bits(source, truth, nth, stop, A, PARTS: tl.constexpr):
    """Bits of the IoUs [g, n] of the ``nth`` members or, if there are PARTS, of the ``nth`` in their lists; 0 past the end."""
    if PARTS > 0:
        bits = tl.load(source + truth.row.to(tl.int64) * (PARTS * MAX_DYNAMIC_K) + nth, mask=nth < stop, other=0)
    else:  # boxes are empty past the end
        bits = bits_of(pair_iou(truth.box, load_boxes(source, truth.image * 4 * A + nth, nth < stop, A)))
    return bits


@triton.jit
def _largest_by_place(
    source, truth, start, stop, A, PARTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The DEPTH largest, as their bits, of the IoUs that each of PLACES meets [g, PLACES], and the largest left out [g, 1].

    They are those from ``start`` to ``stop`` [g, 1].
    """
    left_out = bits_of(tl.zeros((truth.row.shape[0], PLACES), DTYPE))
    kept = _no_tensors()
    for _ in tl.static_range(DEPTH):
        kept = kept + (left_out,)
    limit = tl.max(stop) - start
    done = 0
    while done < limit:
        for tile in tl.static_range(BLOCK_P // PLACES):
            nth = start + done + tile * PLACES + tl.arange(0, PLACES)[None, :]
            bits = _load_bits(source, truth, nth, stop, A, PARTS)
            larger = _no_tensors()
            for i in tl.static_range(DEPTH):
                larger = larger + (tl.maximum(kept[i], bits),)
                bits = tl.minimum(kept[i], bits)
            kept, left_out = larger, tl.maximum(left_out, bits)
        done += BLOCK_P
    return kept, tl.max(left_out, 1)[:, None]


@triton.jit
def _ten_largest(
    source, truth, start, stop, A, PARTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Bits [g, SLOTS] of the ten largest IoUs of each row, and whether DEPTH at each place were enough."""
    kept, left_out = _largest_by_place(source, truth, start, stop, A, PARTS, DTYPE, BLOCK_P, PLACES, DEPTH)
    place, slot = tl.arange(0, PLACES)[None, :], tl.arange(0, SLOTS)[None, :]
    largest = bits_of(tl.zeros((truth.row.shape[0], SLOTS), DTYPE))
    top = tl.max(largest, 1)[:, None]
    for nth in range(MAX_DYNAMIC_K):
        top = tl.max(kept[0], 1)[:, None]
        largest = tl.where(slot == nth, top, largest)
        is_top = place == tl.min(tl.where(kept[0] == top, place, PLACES), 1)[:, None]
        smaller = _no_tensors()
        for i in tl.static_range(1, DEPTH):
            smaller = smaller + (tl.where(is_top, kept[i], kept[i - 1]),)
        kept = smaller + (tl.where(is_top, 0, kept[DEPTH - 1]),)
    return largest, left_out <= top


@triton.jit
def _list_ious(
    ious_ptr, members, rows, part, step, grid, N, PART_P: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Leave the ten largest IoUs of BLOCK_G rows in every ``step``-th part of the members."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    image = tl.load(rows.image_ptr + offs_g, mask=offs_g < N, other=-1)
    limit = tl.cdiv(tl.max(tl.load(members.anchors.count_ptr + image, mask=image >= 0, other=0)), PART_P)
    while part < limit:
        truth = load_rows(rows, offs_g, N, DTYPE)
        start = part * PART_P
        stop = tl.minimum(list_length(members.anchors, truth), start + PART_P)
        largest, is_exact = _ten_largest(members, truth, start, stop, grid.A, 0, DTYPE, BLOCK_P, PLACES, _FEW)
        if tl.min(is_exact.to(tl.int32)) == 0:
            largest, is_exact = _ten_largest(members, truth, start, stop, grid.A, 0, DTYPE, BLOCK_P, PLACES, _MORE)
            if tl.min(is_exact.to(tl.int32)) == 0:
                largest, _ = _ten_largest(members, truth, start, stop, grid.A, 0, DTYPE, BLOCK_P, PLACES, MAX_DYNAMIC_K)
        slot = tl.arange(0, SLOTS)[None, :]
        at = (truth.row.to(tl.int64) * PARTS + part) * MAX_DYNAMIC_K + slot
        tl.store(ious_ptr + at, largest, mask=(truth.row < N) & (slot < MAX_DYNAMIC_K))
        part += step


@triton.jit
def _list_costs(
    lists, region, members, preds, rows, part, step, grid, N, PARTS: tl.constexpr, RULE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Leave the ten cheapest of every ``step``-th part of the members, for rows that may need others than their own."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    sure = tl.zeros((BLOCK_G,), tl.int32)
    if RULE.SPAN > 0:
        sure = tl.load(region.sure_ptr + offs_g, mask=offs_g < N, other=MAX_DYNAMIC_K)
    if tl.min(sure) < MAX_DYNAMIC_K:
        truth, centre = load_truth(rows, N, BLOCK_G, RULE.DTYPE)
        length = tl.where(sure[:, None] < MAX_DYNAMIC_K, list_length(members.anchors, truth), 0)
        while part * BLOCK_P < tl.max(length):
            nth = part * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
            mask = nth < length
            anchor = load_listed(members.anchors, truth.image, nth, mask, grid.A)
            box = load_boxes(members, truth.image * 4 * grid.A + nth, mask, grid.A)
            key, order = ordered(-costs_anywhere(members, preds, truth, centre, anchor, mask, box, grid, RULE), anchor)
            best, best_order = best_of(tl.where(mask, key, none(key)), order, MAX_DYNAMIC_K, _LIST, RULE.DTYPE)
            store_part(lists, truth.row, length > 0, part, best, best_order, PARTS, MAX_DYNAMIC_K, _LIST)
            part += step


@triton.jit(do_not_specialize=["N", "iou_programs"])
def _simota_claim_kernel(
    ious_ptr, lists, region, members, preds, rows, grid, N, iou_programs, RULE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A program looks through parts of the members for the largest IoUs of BLOCK_G rows or, behind, for the lowest costs."""
    part = tl.program_id(1)
    if part < iou_programs:
        _list_ious(
            ious_ptr, members, rows, part, iou_programs, grid, N, SPLIT.IOU_P, SPLIT.IOU_PARTS, RULE.DTYPE, BLOCK_G, BLOCK_P,
            PLACES,
        )  # fmt: skip
    else:
        step = tl.num_programs(1) - iou_programs
        part -= iou_programs
        _list_costs(lists, region, members, preds, rows, part, step, grid, N, SPLIT.COST_PARTS, RULE, BLOCK_G, SPLIT.COST_P)


@triton.jit
def _dynamic_k(
    ious_ptr, truth, num_parts, SPLIT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr
):
    """How many anchors each row takes [g, 1]: the sum of its ten largest IoUs, at least 1."""
    stop = num_parts * MAX_DYNAMIC_K
    largest, _ = _ten_largest(ious_ptr, truth, 0, stop, 0, SPLIT.IOU_PARTS, DTYPE, BLOCK_P, PLACES, SPLIT.IOU_DEPTH)
    total = tl.sum((value_of(largest).to(tl.float64) * _UNIT).to(tl.int64), 1)[:, None]
    return tl.minimum(tl.maximum(total >> 52, 1), MAX_DYNAMIC_K).to(tl.int32)


@triton.jit
def _nth_cheapest(cost, k, CELLS: tl.constexpr):
    """The place of cells [g, n] among the ``k`` [g, 1] cheapest of their row, of equal ones the first; -1 for the others."""
    place = tl.arange(0, CELLS)[None, :]
    key = ordered(-cost, place)[0]
    nth = tl.full(cost.shape, -1, tl.int32)
    limit = tl.max(k)
    i = 0
    while i < limit:
        at = tl.min(tl.where(key == tl.max(key, 1)[:, None], place, CELLS), 1)[:, None]
        is_next = (place == at) & (i < k)
        nth, key = tl.where(is_next, i, nth), tl.where(is_next, none(key), key)
        i += 1
    return nth


@triton.jit
def _store_claims(state, claims, truth, anchor, nth, A):
    """Claim anchors [g, n] as the ``nth`` of their rows, where that is not negative; how many [g] nobody claimed before."""
    is_first = claim_owned(state, claims.order_ptr, truth, anchor, nth >= 0, A)
    tl.store(claims.anchor_ptr + truth.row.to(tl.int64) * SLOTS + nth, anchor, mask=nth >= 0)
    return tl.sum(is_first.to(tl.int32), 1)[:, None]


@triton.jit(do_not_specialize=["N"])
def _simota_merge_kernel(
    ious_ptr, lists, members, state, claims, region, tally, rows, grid, N, RULE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A program finds the dynamic k of BLOCK_G rows and claims their k cheapest anchors, from what the parts left."""
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    length = list_length(members.anchors, truth)
    k = _dynamic_k(ious_ptr, truth, tl.cdiv(length, SPLIT.IOU_P), SPLIT, RULE.DTYPE, BLOCK_P, PLACES)
    first = tl.zeros_like(truth.row)
    is_short = truth.is_gt
    if RULE.SPAN > 0:
        is_short = tl.load(region.sure_ptr + truth.row, mask=truth.row < N, other=MAX_DYNAMIC_K) < k
    number = tl.where(truth.is_gt & ~is_short, k, 0)
    if RULE.SPAN > 0:
        offs = truth.row.to(tl.int64) * RULE.CELLS + tl.arange(0, RULE.CELLS)[None, :]
        cost = tl.load(region.cost_ptr + offs, mask=truth.is_gt, other=float("inf"))
        anchor = tl.load(region.anchor_ptr + offs, mask=truth.is_gt, other=0)
        first = _store_claims(state, claims, truth, anchor, _nth_cheapest(cost, number, RULE.CELLS), grid.A)
    if tl.max(is_short.to(tl.int32)) > 0:
        num_parts = tl.where(is_short, tl.cdiv(length, SPLIT.COST_P), 0)
        best, best_order = merge_parts(
            lists, truth.row, num_parts, SPLIT.COST_PARTS, MAX_DYNAMIC_K, MAX_DYNAMIC_K, _LIST, RULE.DTYPE, BLOCK_P
        )
        place = rank(best, best_order, MAX_DYNAMIC_K, _LIST)
        nth = tl.where(is_short & (place < k), place, -1)
        first += _store_claims(state, claims, truth, index_of(best_order), nth, grid.A)
        number += tl.sum((nth >= 0).to(tl.int32), 1)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    none_there = tl.full((BLOCK_G, SLOTS), -1, tl.int32)
    tl.store(claims.anchor_ptr + truth.row.to(tl.int64) * SLOTS + slot, none_there, mask=(slot >= number) & (truth.row < N))
    if tally.counts_ptr is not None:
        ptr = tally.counts_ptr + truth.row % SPREAD
        tl.atomic_add(ptr, first, mask=truth.is_gt, sem="relaxed")
        tl.atomic_add(ptr + SPREAD, truth.is_gt.to(tl.int32), mask=truth.is_gt, sem="relaxed")
