"""SimOTA assignment (YOLOX, arXiv 2107.08430): of most anchors nothing but the objectness is read.

A feasible pair of a cheap member costs less than any infeasible one, whatever its class and IoU: a row with k of those in its
own centre region needs the IoUs of the other members, for k, but not their costs. Which anchors are positive is known after
the claims; whose the contested ones are, after the contest.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import State
from .boxes import cross_entropy_with_logits, sigmoid_of, split_sigmoid
from .claims import claim_owned, owner_of
from .members import SPREAD, boxes_of, cells_of, in_box, in_centre, load_boxes, load_truth
from .rows import CONTESTED, contest, list_length, load_listed, load_row_boxes, winner
from .simota_cost import pair_costs, pair_iou
from .topk import bits_of, empty_list, index_of, keep_best, none, ordered, rank, value_of

SLOTS: tl.constexpr = tl.constexpr(16)  # places a row for its claims, of which there are at most 10
_MAX_DYNAMIC_K: tl.constexpr = tl.constexpr(10)
_LIST: tl.constexpr = tl.constexpr(32)  # a place a lane
_FEW: tl.constexpr = tl.constexpr(3)  # of the largest IoUs at one of so many places: hardly ever are there more
_SURE_COST: tl.constexpr = tl.constexpr(5e5)  # a feasible cost below is less than any infeasible one
_UNIT: tl.constexpr = tl.constexpr(float(1 << 52))


class Owned(NamedTuple):
    """Claims [n]: place, image, anchor, the row that it is matched with, whether it is a positive that its row owns."""

    slot: Any
    image: Any
    anchor: Any
    row: Any
    is_pos: Any


class Objectness(NamedTuple):
    """Objectness probability (B, A), None if unwanted, and the sum of its cross entropy over each of some programs."""

    prob_ptr: Any
    sum_ptr: Any


# ---- claims


@triton.jit
def _costs_anywhere(members, preds, truth, centre, anchor, mask, grid, RULE: tl.constexpr):
    """Cost of rows [g, 1] with members [g, n] wherever they are."""
    cell = cells_of(anchor, mask, preds, grid, RULE)
    is_feasible = in_centre(cell, centre, RULE.RADIUS)
    if RULE.HAS_BOX:
        is_feasible = is_feasible & in_box(cell, truth.box)
    background = tl.load(members.cost_ptr + truth.image * grid.A + anchor, mask=mask, other=0.0)
    iou = pair_iou(truth.box, boxes_of(preds, truth.image, anchor, mask, grid, RULE))
    return pair_costs(background, preds, truth, anchor, mask, iou, is_feasible, RULE.DTYPE)


@triton.jit
def _no_tensors():
    return ()


@triton.jit
def _largest_by_place(
    members, truth, length, A, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr, DEPTH: tl.constexpr
):
    """The DEPTH largest IoUs, as their bits, of the members that each of PLACES meets [g, PLACES], and the largest left out."""
    left_out = bits_of(tl.zeros((truth.row.shape[0], PLACES), DTYPE))
    kept = _no_tensors()
    for _ in tl.static_range(DEPTH):
        kept = kept + (left_out,)
    limit = tl.max(length)
    start = 0
    while start < limit:
        for tile in tl.static_range(BLOCK_P // PLACES):
            nth = start + tile * PLACES + tl.arange(0, PLACES)[None, :]
            # 0 past the end, where boxes are empty.
            bits = bits_of(pair_iou(truth.box, load_boxes(members, truth.image * 4 * A + nth, nth < length, A)))
            larger = _no_tensors()
            for i in tl.static_range(DEPTH):
                larger = larger + (tl.maximum(kept[i], bits),)
                bits = tl.minimum(kept[i], bits)
            kept, left_out = larger, tl.maximum(left_out, bits)
        start += BLOCK_P
    return kept, tl.max(left_out, 1)[:, None]


@triton.jit
def _sum_of_largest(
    members, truth, length, A, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr, DEPTH: tl.constexpr
):
    """The sum of the ten largest IoUs of each row [g, 1], as an integer; and whether DEPTH at each place were enough."""
    kept, left_out = _largest_by_place(members, truth, length, A, DTYPE, BLOCK_P, PLACES, DEPTH)
    place = tl.arange(0, PLACES)[None, :]
    total = tl.zeros(truth.row.shape, tl.int64)
    for _ in tl.static_range(_MAX_DYNAMIC_K):
        top = tl.max(kept[0], 1)[:, None]
        total += (value_of(top).to(tl.float64) * _UNIT).to(tl.int64)
        is_top = place == tl.min(tl.where(kept[0] == top, place, PLACES), 1)[:, None]
        smaller = _no_tensors()
        for i in tl.static_range(1, DEPTH):
            smaller = smaller + (tl.where(is_top, kept[i], kept[i - 1]),)
        kept = smaller + (tl.where(is_top, 0, kept[DEPTH - 1]),)
    return total, left_out <= top


@triton.jit
def _dynamic_k(members, truth, length, A, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr):
    """How many anchors each row takes [g, 1]: the sum of its ten largest IoUs, at least 1."""
    total, is_exact = _sum_of_largest(members, truth, length, A, DTYPE, BLOCK_P, PLACES, _FEW)
    if tl.min(is_exact.to(tl.int32)) == 0:
        total, _ = _sum_of_largest(members, truth, length, A, DTYPE, BLOCK_P, PLACES, _MAX_DYNAMIC_K)
    return tl.minimum(tl.maximum(total >> 52, 1), _MAX_DYNAMIC_K).to(tl.int32)


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


@triton.jit
def _claim_anywhere(
    members,
    state,
    claims,
    preds,
    truth,
    centre,
    length,
    k,
    grid,
    RULE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Claim the ``k`` cheapest of all members, ``length`` [g, 1] in each row's list.

    How many [g, 1] these are, and how many of them nobody claimed before.
    """
    best, best_order = empty_list(BLOCK_G, _MAX_DYNAMIC_K, _LIST, RULE.DTYPE)
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        mask = nth < length
        anchor = load_listed(members.anchors, truth.image, nth, mask, grid.A)
        cost = _costs_anywhere(members, preds, truth, centre, anchor, mask, grid, RULE)
        key, order = ordered(-cost, anchor)
        best, best_order = keep_best(best, best_order, tl.where(mask, key, none(key)), order)
        start += BLOCK_P
    place = rank(best, best_order, _MAX_DYNAMIC_K, _LIST)
    first = _store_claims(state, claims, truth, index_of(best_order), tl.where(place < k, place, -1), grid.A)
    return tl.sum((place < k).to(tl.int32), 1)[:, None], first


@triton.jit(do_not_specialize=["N"])
def _simota_claim_kernel(
    members, state, claims, region, tally, preds, rows, grid, N, RULE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, PLACES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program finds the dynamic k of BLOCK_G rows and claims their k cheapest anchors."""
    truth, centre = load_truth(rows, N, BLOCK_G, RULE.DTYPE)
    length = list_length(members.anchors, truth)
    k = _dynamic_k(members, truth, length, grid.A, RULE.DTYPE, BLOCK_P, PLACES)
    number, first = tl.zeros_like(truth.row), tl.zeros_like(truth.row)
    is_short = truth.is_gt
    if RULE.SPAN > 0:
        offs = truth.row.to(tl.int64) * RULE.CELLS + tl.arange(0, RULE.CELLS)[None, :]
        cost = tl.load(region.cost_ptr + offs, mask=truth.is_gt, other=float("inf"))
        anchor = tl.load(region.anchor_ptr + offs, mask=truth.is_gt, other=0)
        is_short = is_short & (tl.sum((cost < _SURE_COST).to(tl.int32), 1)[:, None] < k)
        number = tl.where(truth.is_gt & ~is_short, k, 0)
        first = _store_claims(state, claims, truth, anchor, _nth_cheapest(cost, number, RULE.CELLS), grid.A)
    if tl.max(is_short.to(tl.int32)) > 0:
        length = tl.where(is_short, length, 0)
        more, more_first = _claim_anywhere(
            members, state, claims, preds, truth, centre, length, k, grid, RULE, BLOCK_G, BLOCK_S
        )
        number, first = number + more, first + more_first
    slot = tl.arange(0, SLOTS)[None, :]
    none_there = tl.full((BLOCK_G, SLOTS), -1, tl.int32)
    tl.store(claims.anchor_ptr + truth.row.to(tl.int64) * SLOTS + slot, none_there, mask=(slot >= number) & (truth.row < N))
    if tally.counts_ptr is not None:
        ptr = tally.counts_ptr + truth.row % SPREAD
        tl.atomic_add(ptr, first, mask=truth.is_gt, sem="relaxed")
        tl.atomic_add(ptr + SPREAD, truth.is_gt.to(tl.int32), mask=truth.is_gt, sem="relaxed")


# ---- conflicts, and the objectness of all


@triton.jit
def _objectness(objectness, tally, state, members, obj_logits, A, index, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """Probability of BLOCK_A anchors of one image, and the sum of their cross entropy; positives are claimed by now."""
    chunks = (A + BLOCK_A - 1) // BLOCK_A
    image = (index // chunks).to(tl.int64)
    word = (index % chunks) * (BLOCK_A // 32) + tl.arange(0, BLOCK_A // 32)[:, None]
    bit = tl.arange(0, 32)[None, :]
    offs = word * 32 + bit
    mask = offs < A
    num_words = (A + 31) // 32
    members_of = tl.load(members.words_ptr + image * num_words + word, mask=word < num_words, other=0)
    is_member = mask & (((members_of >> bit) & 1) != 0)
    is_pos = tl.load(state.row_ptr + image * A + offs, mask=is_member, other=-1) >= 0
    ptr = obj_logits.ptr + image * obj_logits.row + offs.to(tl.int64) * obj_logits.column
    x = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    is_up, e = split_sigmoid(x)
    if objectness.prob_ptr is not None:
        tl.store(objectness.prob_ptr + image * A + offs, sigmoid_of(is_up, e, DTYPE), mask=mask)
    loss = tl.sum(tl.where(mask, cross_entropy_with_logits(x, is_pos.to(DTYPE)), 0.0))
    tl.store(objectness.sum_ptr + index, loss)
    tl.atomic_add(tally.poison_ptr, loss, mask=loss != loss, sem="relaxed")


@triton.jit(do_not_specialize=["N", "row_programs"])
def _simota_contest_kernel(
    objectness, tally, members, state, claims, preds, rows, grid, N, row_programs, RULE: tl.constexpr,
    IS_TIE_BREAK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested anchors of the images of BLOCK_G rows to their negated cost.

    The programs after those of the rows read the objectness of BLOCK_A anchors of an image each.
    """
    if tl.program_id(0) < row_programs:
        IS_WIDE: tl.constexpr = tl.float64 == RULE.DTYPE
        truth, centre = load_truth(rows, N, BLOCK_G, RULE.DTYPE)
        length = list_length(state.contested, truth)
        limit = tl.max(length)
        start = 0
        while start < limit:
            nth = start + tl.arange(0, BLOCK_P)[None, :]
            mask = nth < length
            anchor = load_listed(state.contested, truth.image, nth, mask, grid.A)
            cost = _costs_anywhere(members, preds, truth, centre, anchor, mask, grid, RULE)
            # In float64 the states say who claims; what breaks ties has a place of its own.
            at = State(claims.order_ptr, state.best_ptr, state.contested)
            contest(at, truth, truth.image * grid.A + anchor, -cost, mask, IS_TIE_BREAK, IS_WIDE)
            start += BLOCK_P
    elif objectness.sum_ptr is not None:
        index = tl.program_id(0) - row_programs
        _objectness(objectness, tally, state, members, preds.obj_logits, grid.A, index, RULE.DTYPE, BLOCK_A)


# ---- results


@triton.jit
def settled(state, claims, rows, N, grid, IS_WIDE: tl.constexpr, BLOCK_G: tl.constexpr):
    """The claims that BLOCK_G rows own, with the rows that won them: all that a row alone claimed, some of the contested."""
    slot = tl.program_id(0) * BLOCK_G * SLOTS + tl.arange(0, BLOCK_G * SLOTS)
    own_row = (slot // SLOTS).to(tl.int32)
    anchor = tl.load(claims.anchor_ptr + slot, mask=own_row < N, other=-1)
    image = tl.maximum(tl.load(rows.image_ptr + own_row, mask=own_row < N, other=0), 0).to(tl.int64)
    is_claim = anchor >= 0
    anchor = tl.where(is_claim, anchor, 0)
    cell = image * grid.A + anchor
    mark = tl.load(state.row_ptr + cell, mask=is_claim, other=-1)
    is_pos = is_claim & (owner_of(mark) == own_row)
    is_contested = is_pos & (mark >= CONTESTED)
    order = 0
    if IS_WIDE:
        order = tl.load(claims.order_ptr + cell, mask=is_contested, other=0)
    row = tl.where(is_contested, winner(state, cell, order, is_contested, IS_WIDE), own_row)
    return Owned(slot, image, anchor, tl.where(is_pos, row, -1), is_pos)


@triton.jit
def store_matches(matches, own, iou, A):
    """Write the row of positives, and their IoU."""
    cell = own.image * A + own.anchor
    tl.store(matches.row_ptr + cell, own.row, mask=own.is_pos)
    tl.store(matches.iou_ptr + cell, iou, mask=own.is_pos)


@triton.jit(do_not_specialize=["N"])
def _simota_settle_kernel(matches, state, claims, preds, rows, grid, N, RULE: tl.constexpr, BLOCK_G: tl.constexpr):
    """A program settles the anchors that BLOCK_G rows own."""
    own = settled(state, claims, rows, N, grid, tl.float64 == RULE.DTYPE, BLOCK_G)
    gt = load_row_boxes(rows.xyxy_ptr, 4, 1, own.row, own.is_pos, RULE.DTYPE)
    store_matches(matches, own, pair_iou(gt, boxes_of(preds, own.image, own.anchor, own.is_pos, grid, RULE)), grid.A)
