"""The anchors that take part in an image of YOLOX's assignment, its ``members``: cells in centre regions, or in boxes too.

They are listed in any order, with their boxes in the order of the list.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Anchors, Points, Tensor2, Tensor3
from .decode import load_raw_at, raw_corners
from .grid import Cell, cell_centres, load_points, most_cells, rectangle_cells, rectangle_size, sized
from .packing import pack_rows
from .rows import Box, load_rows
from .simota_cost import background_cost, pair_costs, pair_iou

MAX_DYNAMIC_K: tl.constexpr = tl.constexpr(10)
_SURE_COST: tl.constexpr = tl.constexpr(5e5)  # a feasible cost below is less than any infeasible one
SPREAD: tl.constexpr = tl.constexpr(32)  # places of one count, so that not all rows wait for one another


class Rule(NamedTuple):
    """Constants: classes, SimOTA's regions, and the grid's strides or, without ``IS_GRID``, arbitrary points.

    A centre region holds the centres of at most ``SPAN`` cells a side and level, and ``CELLS`` hold them all. ``SPAN`` is 0 if
    they are too many, or points: then a row looks at every member's cost.
    """

    C: int
    RADIUS: float
    HAS_BOX: bool
    IS_GRID: bool
    STRIDES: tuple[float, ...]
    SPAN: int
    CELLS: int
    DTYPE: Any


class Predictions(NamedTuple):
    """Raw boxes (B, A, 4), or boxes at arbitrary points, objectness (B, A) and class logits (B, A, C)."""

    boxes: Tensor3
    obj_logits: Tensor2
    logits: Tensor3
    points: Points | None


class Members(NamedTuple):
    """The list of members; a bit an anchor, which keeps each in it once; boxes (B, 4, A) in the order of the list; and the cost
    of no class (B, A).
    """

    anchors: Anchors
    words_ptr: Any
    boxes_ptr: Any
    cost_ptr: Any


class Region(NamedTuple):
    """Cost and anchor (N, CELLS) of the cells of every row's centre region, infinite where a pair is not feasible.

    ``sure`` (N,) are those that cost less than any infeasible pair; of a row that does not count, all that it could take.
    """

    cost_ptr: Any
    anchor_ptr: Any
    sure_ptr: Any


class Claims(NamedTuple):
    """Anchors (N, SLOTS) that each row claimed, -1 for none; what breaks ties (B, A) of contested anchors, in float64."""

    anchor_ptr: Any
    order_ptr: Any


class Matches(NamedTuple):
    """The row that every anchor (B, A) is matched with, and their IoU; None where nobody wants them."""

    row_ptr: Any
    iou_ptr: Any


class Tally(NamedTuple):
    """Counts (2, SPREAD) of positives and ground truths, which rows add to in SPREAD places each.

    ``poison`` () is 0, or NaN after a prediction that takes part in the loss and is not finite.
    """

    counts_ptr: Any
    poison_ptr: Any


class Point(NamedTuple):
    """Centres [g, 1] of rows in pixels."""

    x: Any
    y: Any


# ---- tiles


@triton.jit
def load_truth(rows, N, BLOCK_G: tl.constexpr, DTYPE: tl.constexpr):
    truth = load_rows(rows, tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), N, DTYPE)
    ptr = rows.xywh_ptr + truth.row.to(tl.int64) * 4
    x = tl.load(ptr, mask=truth.row < N, other=0.0).to(DTYPE)
    return truth, Point(x, tl.load(ptr + 1, mask=truth.row < N, other=0.0).to(DTYPE))


@triton.jit
def _first_cell(centre, size, STRIDE: tl.constexpr, RULE: tl.constexpr):
    """The first cell of an axis whose centre is in a region, or one before the grid: at most SPAN cells from there are."""
    first = tl.ceil(centre / STRIDE - (RULE.RADIUS + 0.501))
    first = tl.minimum(tl.maximum(first, -1.0 - RULE.SPAN), size)
    is_in = tl.abs((first + 0.5) * STRIDE - centre) < tl.full((), RULE.RADIUS, RULE.DTYPE) * STRIDE
    return first.to(tl.int32) + tl.where(is_in, 0, 1)


@triton.jit
def _region_cells(place, centre, grid, RULE: tl.constexpr):
    """The cells [g, n] of centre regions [g, 1] in order of their anchors, and which of them there are."""
    STRIDES: tl.constexpr = RULE.STRIDES
    level_of = place // (RULE.SPAN * RULE.SPAN)
    rest = place - level_of * (RULE.SPAN * RULE.SPAN)
    dy = rest // RULE.SPAN
    dx = rest - dy * RULE.SPAN
    column, row = dx + tl.zeros_like(centre.x).to(tl.int32), dy + tl.zeros_like(centre.x).to(tl.int32)
    width, height, first_anchor = column * 0, column * 0, column * 0
    stride = tl.full(column.shape, 1, RULE.DTYPE)
    start = 0
    for level in tl.static_range(len(STRIDES)):
        h, w = grid.shapes[2 * level], grid.shapes[2 * level + 1]
        is_here = level_of == level
        column = tl.where(is_here, _first_cell(centre.x, w, STRIDES[level], RULE) + dx, column)
        row = tl.where(is_here, _first_cell(centre.y, h, STRIDES[level], RULE) + dy, row)
        width, height = tl.where(is_here, w, width), tl.where(is_here, h, height)
        first_anchor = tl.where(is_here, start, first_anchor)
        stride = tl.where(is_here, STRIDES[level], stride).to(RULE.DTYPE)
        start += h * w
    x, y = (column.to(RULE.DTYPE) + 0.5) * stride, (row.to(RULE.DTYPE) + 0.5) * stride
    cell = Cell(first_anchor + row * width + column, x, y, stride)
    is_cell = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (level_of < len(STRIDES))
    is_cell = is_cell & in_centre(cell, centre, RULE.RADIUS)
    return Cell(tl.where(is_cell, cell.anchor, 0), x, y, stride), is_cell


@triton.jit
def in_centre(cell, centre, RADIUS: tl.constexpr):
    reach = tl.full(cell.stride.shape, RADIUS, cell.stride.dtype) * cell.stride
    return (tl.abs(cell.x - centre.x) < reach) & (tl.abs(cell.y - centre.y) < reach)


@triton.jit
def in_box(cell, box):
    return (cell.x - box.x1 > 0) & (cell.y - box.y1 > 0) & (box.x2 - cell.x > 0) & (box.y2 - cell.y > 0)


@triton.jit
def cells_of(anchor, mask, preds, grid, RULE: tl.constexpr):
    """Anchors [g, n] with their points and strides in pixels."""
    STRIDES: tl.constexpr = RULE.STRIDES
    if RULE.IS_GRID:
        x, y, stride = cell_centres(anchor, grid, STRIDES, RULE.DTYPE)
        x, y = x * stride, y * stride
    else:
        points = preds.points
        x, y = load_points(anchor, mask, points, RULE.DTYPE)
        stride = tl.load(points.strides_ptr + anchor.to(tl.int64) * points.step, mask=mask, other=0.0).to(RULE.DTYPE)
    return Cell(anchor, x, y, stride)


@triton.jit
def boxes_of(preds, image, anchor, mask, grid, RULE: tl.constexpr):
    """Boxes [...] of anchors of images, decoded on a grid."""
    STRIDES: tl.constexpr = RULE.STRIDES
    raw = load_raw_at(preds.boxes, image * preds.boxes.image + anchor.to(tl.int64) * preds.boxes.anchor, mask, RULE.DTYPE)
    box = Box(raw.dx, raw.dy, raw.log_w, raw.log_h)
    if RULE.IS_GRID:
        x, y, stride = cell_centres(anchor, grid, STRIDES, RULE.DTYPE)
        box = raw_corners(raw, x - 0.5, y - 0.5, stride)
    return box


@triton.jit
def _enlist(members, state, truth, anchor, mask, A):
    """List the anchors [g, n] that nobody listed before, as background; which these are, and their places."""
    word = tl.where(mask, truth.image * ((A + 31) // 32) + anchor // 32, 0)
    bit = tl.full(anchor.shape, 1, tl.int32) << (anchor % 32)
    is_new = mask & ((tl.atomic_or(members.words_ptr + word, bit, mask=mask, sem="relaxed") & bit) == 0)
    image = tl.where(truth.is_gt, truth.image, 0)
    # The last cell adds for all. A number a row has another layout, to which Triton 3.7 and 3.8 take all cells: in one thread.
    number = tl.cumsum(is_new.to(tl.int32), 1)
    is_last = truth.is_gt & (tl.arange(0, anchor.shape[1]) == anchor.shape[1] - 1)[None, :]
    ptr = members.anchors.count_ptr + tl.where(is_last, image, 0)
    first = tl.atomic_add(ptr, number, mask=is_last, sem="relaxed")
    place = tl.sum(tl.where(is_last, first, 0), 1)[:, None] + number - 1
    tl.store(members.anchors.ptr + image * A + place, anchor, mask=is_new)
    tl.store(state.row_ptr + image * A + anchor, tl.full(anchor.shape, -1, tl.int32), mask=is_new)
    return is_new, image * 4 * A + place


@triton.jit
def _store_boxes(members, place, box, mask, A):
    """Boxes at their places in the list."""
    ptr = members.boxes_ptr + place
    tl.store(ptr, box.x1, mask=mask)
    tl.store(ptr + A, box.y1, mask=mask)
    tl.store(ptr + 2 * A, box.x2, mask=mask)
    tl.store(ptr + 3 * A, box.y2, mask=mask)


@triton.jit
def load_boxes(members, place, mask, A):
    ptr = members.boxes_ptr + place
    x1 = tl.load(ptr, mask=mask, other=0.0)
    y1 = tl.load(ptr + A, mask=mask, other=0.0)
    x2 = tl.load(ptr + 2 * A, mask=mask, other=0.0)
    return Box(x1, y1, x2, tl.load(ptr + 3 * A, mask=mask, other=0.0))


# ---- kernels


@triton.jit(do_not_specialize=["N", "B", "cells", "words"])
def _simota_prepare_kernel(
    state, matches, members, tally, rows, targets, height: tl.float64, width: tl.float64, N, B, cells, words,
    PACK: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All programs together empty the lists and the tally, if there is one, and pack the ground truth.

    If somebody wants the assignment of all anchors, they make each background.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    none_yet = tl.zeros((BLOCK,), tl.int32)
    tl.store(members.words_ptr + offs, none_yet, mask=offs < words)
    tl.store(members.anchors.count_ptr + offs, none_yet, mask=offs < B)
    tl.store(state.contested.count_ptr + offs, none_yet, mask=offs < B)
    if tally.counts_ptr is not None:
        tl.store(tally.counts_ptr + offs, none_yet, mask=offs < 2 * SPREAD)
        tl.store(tally.poison_ptr + offs, none_yet.to(DTYPE), mask=offs < 1)
    if matches.row_ptr is not None:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(matches.row_ptr + offs, none_yet - 1, mask=offs < cells)
        tl.store(matches.iou_ptr + offs, none_yet.to(DTYPE), mask=offs < cells)
    pack_rows(rows, targets, height, width, N, B, PACK, DTYPE)


@triton.jit
def _list_region(members, state, region, preds, truth, centre, grid, N, RULE: tl.constexpr, PRODUCT: tl.constexpr):
    """List the cells of the rows' centre regions, and find what each costs its row."""
    place = tl.arange(0, RULE.CELLS)[None, :]
    cell, is_cell = _region_cells(place, centre, grid, RULE)
    mask = is_cell & truth.is_gt
    box = boxes_of(preds, truth.image, cell.anchor, mask, grid, RULE)
    is_new, listed = _enlist(members, state, truth, cell.anchor, mask, grid.A)
    _store_boxes(members, listed, box, is_new, grid.A)
    background = background_cost(preds, truth.image, cell.anchor, mask, RULE.C, RULE.DTYPE, PRODUCT)
    tl.store(members.cost_ptr + truth.image * grid.A + cell.anchor, background, mask=is_new)
    is_feasible = mask
    if RULE.HAS_BOX:
        is_feasible = mask & in_box(cell, truth.box)
    iou = pair_iou(truth.box, box)
    cost = pair_costs(background, preds, truth, cell.anchor, mask, iou, is_feasible, RULE.DTYPE)
    offs = truth.row.to(tl.int64) * RULE.CELLS + place
    tl.store(region.cost_ptr + offs, tl.where(is_feasible, cost, float("inf")), mask=truth.row < N)
    tl.store(region.anchor_ptr + offs, cell.anchor, mask=truth.row < N)
    sure = tl.sum((is_feasible & (cost < _SURE_COST)).to(tl.int32), 1)[:, None]
    tl.store(region.sure_ptr + truth.row, tl.where(truth.is_gt, sure, MAX_DYNAMIC_K), mask=truth.row < N)


@triton.jit
def _longest_walk(truth, grid, RULE: tl.constexpr):
    """What none of the rows [g, 1] walks further than."""
    STRIDES: tl.constexpr = RULE.STRIDES
    REACH: tl.constexpr = 0 if RULE.SPAN > 0 else 1.001 * RULE.RADIUS
    length = tl.zeros(truth.row.shape, RULE.DTYPE) + grid.A
    if RULE.IS_GRID:
        width, height = tl.zeros_like(truth.box.x1), tl.zeros_like(truth.box.x1)
        if RULE.HAS_BOX:
            width, height = truth.box.x2 - truth.box.x1, truth.box.y2 - truth.box.y1
        length = most_cells(width, height, STRIDES, REACH)
    return tl.max(tl.where(truth.is_gt, length, -1.0))


@triton.jit
def _list_around(
    members, state, preds, truth, centre, grid, part, parts, RULE: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """List one part of several of the anchors in the rows' boxes, and, without ``SPAN``, in their centre regions."""
    STRIDES: tl.constexpr = RULE.STRIDES
    REACH: tl.constexpr = 0 if RULE.SPAN > 0 else 1.001 * RULE.RADIUS
    around = Box(centre.x, centre.y, centre.x, centre.y)
    if RULE.HAS_BOX:
        around = truth.box
    length = tl.zeros_like(truth.row) + grid.A
    if RULE.IS_GRID:
        length = rectangle_size(around, grid, STRIDES, REACH)
    length = tl.where(truth.is_gt, length, 0)
    limit = tl.max(length)
    start = part * BLOCK_P
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        anchor = nth + tl.zeros_like(truth.row)
        if RULE.IS_GRID:
            anchor = rectangle_cells(nth, around, grid, STRIDES, RULE.DTYPE, REACH).anchor
        cell = cells_of(anchor, nth < length, preds, grid, RULE)
        takes_part = tl.zeros(cell.anchor.shape, tl.int1)
        if RULE.SPAN == 0:
            takes_part = in_centre(cell, centre, RULE.RADIUS)
        if RULE.HAS_BOX:
            takes_part = takes_part | in_box(cell, truth.box)
        is_new, listed = _enlist(members, state, truth, cell.anchor, (nth < length) & takes_part, grid.A)
        if tl.max(is_new.to(tl.int32)) > 0:
            box = boxes_of(preds, truth.image, cell.anchor, is_new, grid, RULE)
            _store_boxes(members, listed, box, is_new, grid.A)
            background = background_cost(preds, truth.image, cell.anchor, is_new, RULE.C, RULE.DTYPE, PRODUCT)
            tl.store(members.cost_ptr + truth.image * grid.A + cell.anchor, background, mask=is_new)
        start += parts * BLOCK_P


@triton.jit(do_not_specialize=["N"])
def _simota_member_kernel(
    members, state, region, preds, rows, grid, N, RULE: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program lists anchors that take part because of BLOCK_G rows, or a part of them, and finds their cost of no class."""
    grid = sized(grid)
    NUM_REGIONS: tl.constexpr = 1 if RULE.SPAN > 0 else 0
    truth, centre = load_truth(rows, N, BLOCK_G, RULE.DTYPE)
    if tl.program_id(1) < NUM_REGIONS:
        if RULE.SPAN > 0:
            _list_region(members, state, region, preds, truth, centre, grid, N, RULE, PRODUCT)
    else:
        part, parts = tl.program_id(1) - NUM_REGIONS, tl.num_programs(1) - NUM_REGIONS
        if part * BLOCK_P <= _longest_walk(truth, grid, RULE):
            _list_around(members, state, preds, truth, centre, grid, part, parts, RULE, PRODUCT, BLOCK_P)
