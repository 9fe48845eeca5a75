"""SimOTA assignment (YOLOX, arXiv 2107.08430): of most anchors nothing but the objectness is read.

Which anchors are positive is known after the claims; whose the contested ones are, after the contest.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import State
from .boxes import cross_entropy_with_logits, sigmoid_of, split_sigmoid
from .claims import owner_of
from .grid import sized
from .members import boxes_of, load_truth
from .rows import CONTESTED, contest, list_length, load_listed, load_row_boxes, winner
from .simota_claims import SLOTS, costs_anywhere
from .simota_cost import pair_iou


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
    grid = sized(grid)
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
            box = boxes_of(preds, truth.image, anchor, mask, grid, RULE)
            cost = costs_anywhere(members, preds, truth, centre, anchor, mask, box, grid, RULE)
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
    grid = sized(grid)
    own = settled(state, claims, rows, N, grid, tl.float64 == RULE.DTYPE, BLOCK_G)
    gt = load_row_boxes(rows.xyxy_ptr, 4, 1, own.row, own.is_pos, RULE.DTYPE)
    store_matches(matches, own, pair_iou(gt, boxes_of(preds, own.image, own.anchor, own.is_pos, grid, RULE)), grid.A)
