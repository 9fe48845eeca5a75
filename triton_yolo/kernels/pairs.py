"""Tile functions of task-aligned assignment: ground-truth rows with their candidates, overlap and metric of both.

The anchors of a row are the cells of its rectangle of the grid (``IS_GRID``: scores are logits), or all ``A`` of arbitrary
points (scores are probabilities).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import overlap, power, sigmoid
from .grid import load_points, rectangle_cells, rectangle_size
from .oriented import Oriented, direction, prob_overlap
from .rows import Box, load_anchor_boxes, load_listed, load_rows


class Rule(NamedTuple):
    """Constants of the task-aligned assigner, for cells of a grid with these strides or for arbitrary points.

    ``IS_PROPER``: no predicted box has a negative side.
    """

    ALPHA: float
    BETA: float
    MIN_SIDE: float
    EPS: float
    STRIDES: tuple[float, ...]
    IS_GRID: bool
    IS_PROPER: bool
    DTYPE: Any
    IS_ORIENTED: bool = False


class Rectangle(NamedTuple):
    """Rotated rectangles [...]: centre, half sides, cosine and sine."""

    x: Any
    y: Any
    half_w: Any
    half_h: Any
    cos: Any
    sin: Any


@triton.jit
def load_truth(rows, offs_g, N, RULE: tl.constexpr):
    """Ground truth of rows ``offs_g`` [g], with boxes of the rule's kind."""
    return load_rows(rows, offs_g, N, RULE.DTYPE, RULE.IS_ORIENTED)


@triton.jit
def candidate_area(box, RULE: tl.constexpr):
    """Where candidates of boxes are: the boxes with short sides widened."""
    if RULE.IS_ORIENTED:
        cos, sin = direction(box.angle)
        half_w, half_h = tl.maximum(box.w, RULE.MIN_SIDE) / 2, tl.maximum(box.h, RULE.MIN_SIDE) / 2
        wide = Rectangle(box.x, box.y, half_w, half_h, cos, sin)
    else:
        wide = widened(box, RULE.MIN_SIDE)
    return wide


@triton.jit
def widened(box, MIN_SIDE: tl.constexpr):
    """Boxes with every side at least ``MIN_SIDE`` about their centres."""
    x1, y1, x2, y2 = box.x1, box.y1, box.x2, box.y2
    if MIN_SIDE > 0:
        x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        x1, x2 = tl.where(width < MIN_SIDE, x - MIN_SIDE / 2, x1), tl.where(width < MIN_SIDE, x + MIN_SIDE / 2, x2)
        y1, y2 = tl.where(height < MIN_SIDE, y - MIN_SIDE / 2, y1), tl.where(height < MIN_SIDE, y + MIN_SIDE / 2, y2)
    return Box(x1, y1, x2, y2)


@triton.jit
def _around(wide, RULE: tl.constexpr):
    """Upright rectangles around where candidates are, a hair wider than rotated ones need."""
    box = wide
    if RULE.IS_ORIENTED:
        cos, sin = tl.abs(wide.cos), tl.abs(wide.sin)
        reach_x, reach_y = wide.half_w * cos + wide.half_h * sin, wide.half_w * sin + wide.half_h * cos
        reach_x, reach_y = reach_x + 1e-5 * (reach_x + tl.abs(wide.x)), reach_y + 1e-5 * (reach_y + tl.abs(wide.y))
        box = Box(wide.x - reach_x, wide.y - reach_y, wide.x + reach_x, wide.y + reach_y)
    return box


@triton.jit
def walk_cells(box, grid, RULE: tl.constexpr):
    """How many cells of the grid are to be walked over for boxes [n]."""
    STRIDES: tl.constexpr = RULE.STRIDES  # Triton 3.6 takes no tuple that is part of a constant as an argument
    return rectangle_size(_around(candidate_area(box, RULE), RULE), grid, STRIDES)


@triton.jit
def walk_length(rows, offs_g, N, grid, RULE: tl.constexpr):
    """How many anchors each row of ``offs_g`` [g] walks over: [g, 1], 0 for one that does not count."""
    row = offs_g.to(tl.int32)[:, None]
    if RULE.IS_GRID:
        length = tl.load(rows.walk_ptr + row, mask=row < N, other=0)
    else:
        length = tl.where(tl.load(rows.image_ptr + row, mask=row < N, other=-1) >= 0, grid.A, 0)
    return length


@triton.jit
def candidates(nth, length, wide, points, grid, RULE: tl.constexpr):
    """The ``nth`` anchors [g, n] of each row's walk, in increasing order, and whether each is a candidate."""
    STRIDES: tl.constexpr = RULE.STRIDES
    mask = nth < length
    if RULE.IS_GRID:
        cell = rectangle_cells(nth, _around(wide, RULE), grid, STRIDES, RULE.DTYPE)
        anchor, x, y = cell.anchor, cell.x, cell.y
    else:
        anchor = nth + tl.zeros_like(length)
        x, y = load_points(anchor, mask, points, RULE.DTYPE)
    return anchor, mask & is_inside(x, y, wide, RULE)


@triton.jit
def is_inside(x, y, wide, RULE: tl.constexpr):
    """Whether points lie inside by more than an eps; in rotated rectangles or on an edge."""
    if RULE.IS_ORIENTED:
        dx, dy = x - wide.x, y - wide.y
        along, across = tl.abs(dx * wide.cos + dy * wide.sin), tl.abs(dy * wide.cos - dx * wide.sin)
        result = (along <= wide.half_w) & (across <= wide.half_h)
    else:
        EPS: tl.constexpr = RULE.EPS
        result = (x - wide.x1 > EPS) & (y - wide.y1 > EPS) & (wide.x2 - x > EPS) & (wide.y2 - y > EPS)
    return result


@triton.jit
def load_contested(nth, length, num_contested, truth, wide, contested, grid, RULE: tl.constexpr):
    """The ``nth`` anchors [g, n] to look at for contested candidates of each row, and whether there are so many.

    They are the list of its image or, where that is shorter, its own walk, in which others lie too.
    """
    STRIDES: tl.constexpr = RULE.STRIDES
    is_listed = num_contested <= length
    mask = (nth >= 0) & (nth < tl.minimum(num_contested, length))
    anchor = load_listed(contested, truth.image, nth, mask & is_listed, grid.A)
    if RULE.IS_GRID:
        are_listed = tl.min(is_listed.to(tl.int32))
        if are_listed == 0:
            cell = rectangle_cells(nth, _around(wide, RULE), grid, STRIDES, RULE.DTYPE)
            anchor = tl.where(is_listed, anchor, cell.anchor)
    return anchor, mask


@triton.jit
def pair_overlaps(truth, anchor, mask, boxes, RULE: tl.constexpr):
    """CIoU or ProbIoU, not below 0, of rows' boxes with predicted ones of anchors [g, n]; 0 where ``mask`` is false or NaN."""
    gt, box = truth.box, load_anchor_boxes(boxes, truth.image, anchor, mask, RULE.DTYPE)
    if RULE.IS_ORIENTED:
        ptr = boxes.ptr + truth.image * boxes.image + anchor.to(tl.int64) * boxes.anchor + 4 * boxes.channel
        angle = tl.load(ptr, mask=mask, other=0.0).to(RULE.DTYPE)
        value = prob_overlap(Oriented(box.x1, box.y1, box.x2, box.y2, angle), gt, 1e-7, 0.0)
    else:
        value = overlap(gt.x1, gt.y1, gt.x2, gt.y2, box.x1, box.y1, box.x2, box.y2, "ciou", 1e-7, RULE.IS_PROPER)
    return tl.where(mask & (value > 0), value, 0.0)


@triton.jit
def pair_metrics(truth, anchor, mask, overlaps, scores, RULE: tl.constexpr):
    """Metric [g, n] of pairs with these overlaps; 0 where ``mask`` is false or NaN.

    On a grid, scores are loaded where the overlap is 0 too, so as not to wait for it; among arbitrary points that would spill.
    """
    if not RULE.IS_GRID and RULE.BETA > 0:
        mask = mask & (overlaps > 0)
    offs = truth.image * scores.image + anchor.to(tl.int64) * scores.anchor + truth.label * scores.channel
    score = tl.load(scores.ptr + offs, mask=mask, other=0.0).to(RULE.DTYPE)
    if RULE.IS_GRID:
        score = sigmoid(score)
    metric = power(score, RULE.ALPHA) * power(overlaps, RULE.BETA)
    return tl.where(mask & (metric > 0), metric, 0.0)
