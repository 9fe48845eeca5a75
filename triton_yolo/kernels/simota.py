"""SimOTA assignment (YOLOX, arXiv 2107.08430): one program a ground-truth row, no tensor of pairs.

The anchors that take part in an image, its ``members``, are listed. A bit an anchor in ``words`` (B, ceil(A / 32)) keeps each
in the list once. Anchors are cells of a grid (``IS_GRID``), or any points, each with its stride.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Anchors
from .boxes import log_not, log_rest, overlap, sigmoid
from .decode import load_raw, raw_corners
from .grid import Cell, anchor_points, cell_centres, rectangle_cells, rectangle_size
from .rows import (
    CONTESTED,
    Box,
    append,
    claim,
    contest,
    list_length,
    load_anchor_boxes,
    load_listed,
    load_row_boxes,
    load_rows,
    pack_rows,
    places,
    store_anchor_boxes,
    winner,
)
from .topk import empty_list, index_of, is_taken, keep_best, merged, none, ordered, rank, value_of

_INFEASIBLE_COST: tl.constexpr = tl.constexpr(1e6)
_MAX_DYNAMIC_K: tl.constexpr = tl.constexpr(10)
_LIST: tl.constexpr = tl.constexpr(32)  # a place a lane
_BROKEN: tl.constexpr = tl.constexpr(-2)
"""State of an anchor whose box or class logits are not finite: background otherwise."""
_UNIT: tl.constexpr = tl.constexpr(float(1 << 52))


class Rule(NamedTuple):
    """Constants of SimOTA, for cells of a grid with these strides or for arbitrary points."""

    RADIUS: float
    HAS_BOX: bool
    STRIDES: tuple[float, ...]
    IS_GRID: bool
    DTYPE: Any


class Table(NamedTuple):
    """What pairs need of anchors (B, A): the cost of no class, and the objectness probability."""

    cost_ptr: Any
    obj_ptr: Any


class Counts(NamedTuple):
    """Numbers (3,) of positives, ground truths and predictions that poison the loss; and that of each program that looked."""

    ptr: Any
    broken_ptr: Any


class Members(NamedTuple):
    """The list of members, and the bits that keep each in it once."""

    anchors: Anchors
    words_ptr: Any


# ---- tiles


@triton.jit
def _cells(anchor, mask, points, grid, RULE: tl.constexpr):
    """Anchors [g, n] with their points and strides in pixels."""
    STRIDES: tl.constexpr = RULE.STRIDES
    x, y = anchor_points(anchor, mask, points, grid, STRIDES, RULE.IS_GRID, RULE.DTYPE)
    if RULE.IS_GRID:
        stride = cell_centres(anchor, grid, STRIDES, RULE.DTYPE)[2]
    else:
        stride = tl.load(points.strides_ptr + anchor.to(tl.int64) * points.step, mask=mask, other=0.0).to(RULE.DTYPE)
    return Cell(anchor, x, y, stride)


@triton.jit
def _in_regions(cell, box, centre_x, centre_y, RADIUS: tl.constexpr):
    """Whether cells [g, n] are in the centre regions and in the boxes of rows [g, 1]."""
    x, y = cell.x, cell.y
    reach = tl.full(cell.stride.shape, RADIUS, cell.stride.dtype) * cell.stride
    in_centre = (tl.abs(x - centre_x) < reach) & (tl.abs(y - centre_y) < reach)
    in_box = (x - box.x1 > 0) & (y - box.y1 > 0) & (box.x2 - x > 0) & (box.y2 - y > 0)
    return in_centre, in_box


@triton.jit
def _load_centres(rows, truth, N, DTYPE: tl.constexpr):
    ptr = rows.xywh_ptr + truth.row.to(tl.int64) * 4
    mask = truth.row < N
    return tl.load(ptr, mask=mask, other=0.0).to(DTYPE), tl.load(ptr + 1, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _joint_probability(cls_logits, obj_probs):
    return tl.sqrt(sigmoid(cls_logits) * obj_probs)


@triton.jit
def _clamped(logs):
    """Not below -100; NaN stays."""
    return tl.where(logs < -100, -100.0, logs).to(logs.dtype)


@triton.jit
def _iou(gt, box):
    """IoU, 0 where it is undefined."""
    iou = overlap(gt.x1, gt.y1, gt.x2, gt.y2, box.x1, box.y1, box.x2, box.y2, "iou", 0.0)
    return tl.where(iou > 0, iou, 0.0).to(iou.dtype)


@triton.jit
def _pair_costs(truth, centre_x, centre_y, anchor, mask, boxes, table, logits, points, grid, RULE: tl.constexpr):
    """Cost, infinite rather than NaN, and IoU of rows [g, 1] with anchors [g, n] that take part."""
    iou = _iou(truth.box, load_anchor_boxes(boxes, truth.image, anchor, mask, RULE.DTYPE))
    cell = truth.image * grid.A + anchor
    cost = tl.load(table.cost_ptr + cell, mask=mask, other=0.0)
    obj_probs = tl.load(table.obj_ptr + cell, mask=mask, other=0.0)
    offs = truth.image * logits.image + anchor.to(tl.int64) * logits.anchor + truth.label * logits.channel
    probs = _joint_probability(tl.load(logits.ptr + offs, mask=mask, other=0.0).to(RULE.DTYPE), obj_probs)
    # BCE against the one-hot class differs from that against no class by two terms.
    cost = cost + _clamped(log_not(probs)) - _clamped(tl.log(probs))
    cost = cost + 3 * -tl.log(iou + tl.full(iou.shape, 1e-8, RULE.DTYPE))
    in_centre, in_box = _in_regions(_cells(anchor, mask, points, grid, RULE), truth.box, centre_x, centre_y, RULE.RADIUS)
    is_feasible = in_centre
    if RULE.HAS_BOX:
        is_feasible = in_centre & in_box
    cost = tl.where(is_feasible, cost, cost + _INFEASIBLE_COST)
    return tl.where(cost < float("inf"), cost, float("inf")).to(RULE.DTYPE), iou


@triton.jit
def _class_cost(logits, image, offs_a, mask_a, obj_probs, C, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Cost of no class [n] of anchors of one image, and the sum of their class logits times 0."""
    ptr = logits.ptr + image * logits.image
    cost = tl.zeros((offs_a.shape[0], BLOCK_C), DTYPE)
    poison = tl.zeros((offs_a.shape[0], BLOCK_C), DTYPE)
    start = 0
    while start < C:
        # The sum of log(1 - p) is the logarithm of a product; four factors that are not 0 stay above the smallest float32.
        p, rest = tl.zeros((offs_a.shape[0], BLOCK_C), DTYPE), tl.full((offs_a.shape[0], BLOCK_C), 1, DTYPE)
        end = tl.minimum(start + 4 * BLOCK_C, C)
        while start < end:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_a[:, None] & (offs_c < C)[None, :]
            offs = offs_a.to(tl.int64)[:, None] * logits.anchor + offs_c.to(tl.int64)[None, :] * logits.channel
            x = tl.load(ptr + offs, mask=mask, other=-1e4).to(DTYPE)  # a probability of 0
            probs = _joint_probability(x, obj_probs[:, None])
            cost += tl.where(probs >= 1, 100.0, 0.0)  # the logarithm of 0 counts -100
            probs = tl.where(probs >= 1, 0.0, probs).to(DTYPE)
            p, rest = tl.fma(probs, rest, p), tl.fma(-probs, rest, rest)
            poison += x * 0.0
            start += BLOCK_C
        cost -= log_rest(p, rest)
    return tl.sum(cost, 1), tl.sum(poison, 1)


# ---- kernels


@triton.jit(do_not_specialize=["N", "B"])
def _simota_prepare_kernel(
    boxes, table, state, members, counts, raw_boxes, obj_logits, logits, rows, targets, grid, height: tl.float64,
    width: tl.float64, N, B, RULE: tl.constexpr, PACK: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads everything of BLOCK_A anchors of one image, and makes them background that does not take part.

    It writes their boxes, decoded if ``IS_GRID``, and the ``table``; to ``broken`` 1 if an objectness logit is not finite, else
    0. Other logits count where an anchor takes part, so its state keeps whether they are finite. It clears what the next
    launches count in. All programs together pack the ground truth.
    """
    STRIDES: tl.constexpr = RULE.STRIDES
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < grid.A
    cell = image * grid.A + offs_a
    raw = load_raw(raw_boxes, image, offs_a, mask_a, RULE.DTYPE)
    obj_ptr = obj_logits.ptr + image * obj_logits.row + offs_a.to(tl.int64) * obj_logits.column
    obj = tl.load(obj_ptr, mask=mask_a, other=0.0).to(RULE.DTYPE)
    obj_probs = sigmoid(obj)
    poison = raw.dx * 0.0 + raw.dy * 0.0 + raw.log_w * 0.0 + raw.log_h * 0.0
    box = Box(raw.dx, raw.dy, raw.log_w, raw.log_h)
    if RULE.IS_GRID:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, RULE.DTYPE)
        box = raw_corners(raw, x - 0.5, y - 0.5, stride)
    store_anchor_boxes(boxes, image, offs_a, mask_a, box)
    cost, cls_poison = _class_cost(logits, image, offs_a, mask_a, obj_probs, PACK.C, RULE.DTYPE, BLOCK_C)
    tl.store(table.cost_ptr + cell, cost, mask=mask_a)
    tl.store(table.obj_ptr + cell, obj_probs, mask=mask_a)
    tl.store(state.row_ptr + cell, tl.where(poison + cls_poison == 0, -1, _BROKEN), mask=mask_a)
    num_words = (grid.A + 31) // 32
    word = tl.program_id(0) * (BLOCK_A // 32) + tl.arange(0, BLOCK_A // 32)
    tl.store(members.words_ptr + image * num_words + word, tl.zeros((BLOCK_A // 32,), tl.int32), mask=word < num_words)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts.broken_ptr + program, (tl.sum(obj * 0.0) != 0).to(tl.int32))
    if tl.program_id(0) == 0:
        tl.store(members.anchors.count_ptr + image, 0)
        tl.store(state.contested.count_ptr + image, 0)
    if program == 0:
        tl.store(counts.ptr + tl.arange(0, 4), tl.zeros((4,), tl.int64), mask=tl.arange(0, 4) < 3)
    pack_rows(rows, targets, height, width, N, B, PACK, RULE.DTYPE)


@triton.jit(do_not_specialize=["N"])
def _simota_member_kernel(
    members, counts, state, points, rows, grid, N, RULE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr
):
    """A program lists the anchors that take part because of BLOCK_G rows, counts those rows, and says if an anchor is broken.

    It walks the cells of a rectangle around the regions, a thousandth wider; the test is exact.
    """
    STRIDES: tl.constexpr = RULE.STRIDES
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    centre_x, centre_y = _load_centres(rows, truth, N, RULE.DTYPE)
    tl.atomic_add(counts.ptr + 1, tl.sum(truth.is_gt.to(tl.int64)), sem="relaxed")
    region = Box(centre_x, centre_y, centre_x, centre_y)
    if RULE.HAS_BOX:
        region = truth.box
    length = tl.zeros_like(truth.row) + grid.A
    if RULE.IS_GRID:
        length = rectangle_size(region, grid, STRIDES, 1.001 * RULE.RADIUS)
    length = tl.where(truth.is_gt, length, 0)
    limit = tl.max(length)
    lowest = tl.full((), -1, tl.int32)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        mask = nth < length
        if RULE.IS_GRID:
            cell = rectangle_cells(nth, region, grid, STRIDES, RULE.DTYPE, 1.001 * RULE.RADIUS)
        else:
            cell = _cells(nth + tl.zeros_like(length), mask, points, grid, RULE)
        in_centre, in_box = _in_regions(cell, truth.box, centre_x, centre_y, RULE.RADIUS)
        takes_part = in_centre
        if RULE.HAS_BOX:
            takes_part = in_centre | in_box
        mask = mask & takes_part
        anchor = cell.anchor
        word = tl.where(mask, truth.image * ((grid.A + 31) // 32) + anchor // 32, 0)
        bit = tl.full(anchor.shape, 1, tl.int32) << (anchor % 32)
        is_new = mask & ((tl.atomic_or(members.words_ptr + word, bit, mask=mask, sem="relaxed") & bit) == 0)
        append(members.anchors, truth.image, anchor, is_new, grid.A)
        owner = tl.load(state.row_ptr + truth.image * grid.A + anchor, mask=is_new, other=-1)
        lowest = tl.minimum(lowest, tl.min(owner))
        start += BLOCK_P
    if lowest == _BROKEN:
        tl.atomic_max(counts.ptr + 2, tl.full((), 1, tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def _simota_claim_kernel(
    state, members, boxes, table, logits, points, rows, grid, N, RULE: tl.constexpr,
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the dynamic k of BLOCK_G rows and claims their k cheapest anchors."""
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    centre_x, centre_y = _load_centres(rows, truth, N, RULE.DTYPE)
    cheapest, cheapest_order = empty_list(BLOCK_G * PARTS, _MAX_DYNAMIC_K, _LIST, RULE.DTYPE)
    largest, largest_order = empty_list(BLOCK_G * PARTS, _MAX_DYNAMIC_K, _LIST, RULE.DTYPE)
    length = list_length(members, truth)
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = places(start, PARTS, BLOCK_P)
        mask = nth < length
        anchor = load_listed(members, truth.image, nth, mask, grid.A)
        cost, iou = _pair_costs(truth, centre_x, centre_y, anchor, mask, boxes, table, logits, points, grid, RULE)
        key, order = ordered(-cost, anchor)
        cheapest, cheapest_order = keep_best(cheapest, cheapest_order, tl.where(mask, key, none(key)), order)
        key, order = ordered(iou, anchor)
        key = tl.where(mask & (iou > 0), key, none(key))
        largest, largest_order = keep_best(largest, largest_order, key, order)
        start += PARTS * BLOCK_P
    if PARTS > 1:
        cheapest, cheapest_order = merged(cheapest, cheapest_order, _MAX_DYNAMIC_K, _LIST, RULE.DTYPE)
        largest, largest_order = merged(largest, largest_order, _MAX_DYNAMIC_K, _LIST, RULE.DTYPE)

    is_overlap = is_taken(largest, _MAX_DYNAMIC_K, _LIST)
    # Added up as integers, since the order of a list is any.
    ious = tl.where(is_overlap, value_of(largest).to(tl.float64) * _UNIT, 0.0).to(tl.int64)
    k = tl.minimum(tl.maximum(tl.sum(ious, 1) >> 52, 1), _MAX_DYNAMIC_K)[:, None]
    is_claim = rank(cheapest, cheapest_order, _MAX_DYNAMIC_K, _LIST) < k
    claim(state, truth, index_of(cheapest_order), is_claim, grid.A)


@triton.jit(do_not_specialize=["N"])
def _simota_contest_kernel(
    state, boxes, table, logits, points, rows, grid, N, RULE: tl.constexpr, IS_TIE_BREAK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested anchors of the images of BLOCK_G rows to their negated cost."""
    IS_WIDE: tl.constexpr = tl.float64 == RULE.DTYPE
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, RULE.DTYPE)
    centre_x, centre_y = _load_centres(rows, truth, N, RULE.DTYPE)
    length = list_length(state.contested, truth)
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        mask = nth < length
        anchor = load_listed(state.contested, truth.image, nth, mask, grid.A)
        cost, _ = _pair_costs(truth, centre_x, centre_y, anchor, mask, boxes, table, logits, points, grid, RULE)
        contest(state, truth, truth.image * grid.A + anchor, -cost, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


@triton.jit
def _simota_settle_kernel(state, matched_iou_ptr, counts, boxes, gt_ptr, A, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """A program settles BLOCK_A anchors of one image, the same as when they were prepared, and adds to the counts."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    cell = image * A + offs_a
    owner = tl.load(state.row_ptr + cell, mask=mask_a, other=-1)
    is_contested = owner >= CONTESTED
    won = winner(state, cell, owner, is_contested, tl.float64 == DTYPE)
    row = tl.where(is_contested, won, tl.maximum(owner, -1))
    is_pos = row >= 0
    iou = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row) >= 0:
        box = load_anchor_boxes(boxes, image, offs_a, is_pos, DTYPE)
        iou = tl.where(is_pos, _iou(load_row_boxes(gt_ptr, 4, 1, row, is_pos, DTYPE), box), 0.0)
    tl.store(state.row_ptr + cell, row, mask=mask_a & (row != owner))
    tl.store(matched_iou_ptr + cell, iou, mask=mask_a)
    tl.atomic_add(counts.ptr, tl.sum(is_pos.to(tl.int64)), sem="relaxed")
    broken = tl.load(counts.broken_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.atomic_max(counts.ptr + 2, broken.to(tl.int64), sem="relaxed")
