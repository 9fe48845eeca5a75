"""Tile functions of task-aligned assignment: ground-truth rows with their candidates, overlap and metric of both.

The anchors of a row are the cells of its rectangle of the grid (``IS_GRID``: scores are logits), or all ``A`` of arbitrary
points (scores are probabilities).
"""

import triton
import triton.language as tl

from .boxes import overlap, power, sigmoid
from .grid import anchor_points, rectangle_cells, rectangle_size
from .rows import load_anchor_boxes, load_listed


@triton.jit
def widened(box, MIN_SIDE: tl.constexpr):
    """Boxes with every side at least ``MIN_SIDE`` about their centres."""
    x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    if MIN_SIDE > 0:
        x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        x1, x2 = tl.where(width < MIN_SIDE, x - MIN_SIDE / 2, x1), tl.where(width < MIN_SIDE, x + MIN_SIDE / 2, x2)
        y1, y2 = tl.where(height < MIN_SIDE, y - MIN_SIDE / 2, y1), tl.where(height < MIN_SIDE, y + MIN_SIDE / 2, y2)
    return x1, y1, x2, y2


@triton.jit
def walk_length(is_gt, wide, shapes, A, STRIDES: tl.constexpr, IS_GRID: tl.constexpr):
    """How many anchors each row [g, 1] walks over, 0 for one that does not count."""
    if IS_GRID:
        length = rectangle_size(wide[0], wide[1], wide[2], wide[3], shapes, STRIDES)
    else:
        length = tl.zeros_like(is_gt.to(tl.int32)) + A
    return tl.where(is_gt, length, 0)


@triton.jit
def candidates(
    nth, length, wide, points_ptr, points_stride, shapes,
    STRIDES: tl.constexpr, IS_GRID: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The ``nth`` anchors [g, n] of each row's walk, in increasing order, and whether each is a candidate."""
    mask = nth < length
    if IS_GRID:
        anchor, x, y, _ = rectangle_cells(nth, wide[0], wide[1], wide[2], wide[3], shapes, STRIDES, DTYPE)
    else:
        anchor = nth + tl.zeros_like(length)
        x, y = anchor_points(anchor, mask, points_ptr, points_stride, shapes, STRIDES, IS_GRID, DTYPE)
    return anchor, mask & is_inside(x, y, wide, EPS)


@triton.jit
def is_inside(x, y, wide, EPS: tl.constexpr):
    return (x - wide[0] > EPS) & (y - wide[1] > EPS) & (wide[2] - x > EPS) & (wide[3] - y > EPS)


@triton.jit
def load_contested(
    nth, length, num_contested, image, wide, contested, shapes, A,
    STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The ``nth`` anchors [g, n] to look at for contested candidates of each row, and whether there are so many.

    They are the list of its image or, where that is shorter, its own walk, in which others lie too.
    """
    is_listed = num_contested <= length
    mask = (nth >= 0) & (nth < tl.minimum(num_contested, length))
    anchor = load_listed(contested, image, nth, mask & is_listed, A)
    if IS_GRID:
        cell = rectangle_cells(nth, wide[0], wide[1], wide[2], wide[3], shapes, STRIDES, DTYPE)[0]
        anchor = tl.where(is_listed, anchor, cell)
    return anchor, mask


@triton.jit
def pair_overlaps(image, anchor, mask, box, boxes_ptr, boxes_stride, DTYPE: tl.constexpr):
    """CIoU, not below 0, of the rows' boxes with the predicted ones of anchors [g, n]; 0 where ``mask`` is false or NaN."""
    x1, y1, x2, y2 = load_anchor_boxes(image, anchor, mask, boxes_ptr, boxes_stride, DTYPE)
    ciou = overlap(box[0], box[1], box[2], box[3], x1, y1, x2, y2, "ciou", 1e-7)
    return tl.where(mask & (ciou > 0), ciou, 0.0)


@triton.jit
def pair_metrics(
    image, anchor, label, mask, overlaps, scores_ptr, scores_stride,
    IS_GRID: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Metric [g, n] of pairs with these overlaps; 0 where ``mask`` is false or NaN.

    On a grid, scores are loaded where the overlap is 0 too, so as not to wait for it; among arbitrary points that would spill.
    """
    if not IS_GRID and BETA > 0:
        mask = mask & (overlaps > 0)
    offs = image * scores_stride[0] + anchor.to(tl.int64) * scores_stride[1] + label * scores_stride[2]
    score = tl.load(scores_ptr + offs, mask=mask, other=0.0).to(DTYPE)
    if IS_GRID:
        score = sigmoid(score)
    metric = power(score, ALPHA) * power(overlaps, BETA)
    return tl.where(mask & (metric > 0), metric, 0.0)
