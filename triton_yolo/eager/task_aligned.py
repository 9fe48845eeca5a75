"""Task-aligned assignment (TOOD, arXiv 2108.07755) on the pairs of ground truth and candidate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working
from .._signatures import (
    AlignMetric,
    GroundTruth,
    Metrics,
    Selected,
    SelectTopk,
    TaskAligned,
    TaskAlignedAssign,
    TaskAlignedAssignment,
)
from .boxes import overlap
from .oriented import is_inside_oriented, prob_overlap, upright_bounds, widen_oriented
from .pairs import point_pairs, valid_rows

_BLOCK = 1 << 16  # pairs at a time: their temporaries stay in the processor's cache


def widen(boxes: Tensor, min_side: float) -> Tensor:
    """Widen every side shorter than ``min_side`` to it, about the centre of the box."""
    if min_side <= 0:
        return boxes
    low, high = boxes[..., :2], boxes[..., 2:]
    centre = (low + high) / 2
    is_short = high - low < min_side
    low, high = torch.where(is_short, centre - min_side / 2, low), torch.where(is_short, centre + min_side / 2, high)
    return torch.cat([low, high], -1)


def is_inside(points: Tensor, boxes: Tensor, eps: float) -> Tensor:
    """Whether points (2, P) lie inside boxes (4, P) by more than ``eps``."""
    inside = torch.minimum(points[0] - boxes[0], points[1] - boxes[1])
    return torch.minimum(inside, torch.minimum(boxes[2] - points[0], boxes[3] - points[1])) > eps


class Geometry(NamedTuple):
    """What assignment asks about boxes."""

    widen: Callable[[Tensor, float], Tensor]
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Rectangles, of boxes (n, 4 or 5), that have all points strictly inside that may be in the boxes."""
    is_inside: Callable[[Tensor, Tensor, float], Tensor]
    overlap: Callable[[Tensor, Tensor], Tensor]


AXIS_ALIGNED = Geometry(
    widen, lambda boxes: (boxes[:, :2], boxes[:, 2:]), is_inside, lambda gt, pred: overlap(gt, pred, "ciou", 1e-7)
)
ORIENTED = Geometry(
    widen_oriented, upright_bounds, is_inside_oriented, lambda gt, pred: prob_overlap(gt, pred, 1e-7, 0.0)
)  # fmt: skip


def pair_metric(
    scores: Tensor, boxes: Tensor, gt_boxes: Tensor, alpha: float, beta: float, geometry: Geometry = AXIS_ALIGNED
) -> tuple[Tensor, Tensor]:
    """Metric and overlap (P,) of pairs with class scores (P,), predicted boxes (4 or 5, P) and true boxes."""
    parts = zip(gt_boxes.split(_BLOCK, 1), boxes.split(_BLOCK, 1), strict=True)
    overlaps = torch.cat([geometry.overlap(gt.T, pred.T) for gt, pred in parts])
    overlaps = torch.where(overlaps > 0, overlaps, 0)
    metric = power(scores, alpha) * power(overlaps, beta)
    return torch.where(metric > 0, metric, 0), overlaps


def power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent``, by products for the usual 6, which are several times faster."""
    return (x * x * x).square() if exponent == 6 else x.pow(exponent)


def topk_per_row(metric: Tensor, rows: Tensor, topk: int) -> Tensor:
    """Indices of the ``topk`` highest positive metrics of every row; of equal ones the earlier pair. Rows are in order."""
    kept = (metric > 0).nonzero().squeeze(1)
    # Bits of positive floats order as the floats do, and integers sort stably in linear time.
    bits = metric[kept].view(torch.int64 if metric.dtype == torch.float64 else torch.int32)
    survivors = _reaches_topk(bits, rows[kept], topk).nonzero().squeeze(1)
    kept, bits = kept[survivors], bits[survivors]
    by_metric = (torch.iinfo(bits.dtype).max - bits).sort(stable=True).indices
    rows = rows[kept]
    by_row = by_metric[rows[by_metric].sort(stable=True).indices]
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    return kept[by_row[rank < topk]]


def _reaches_topk(bits: Tensor, rows: Tensor, topk: int) -> Tensor:
    """Which metrics may be among the ``topk`` of their row, by their exponents alone: far fewer are left to sort."""
    shift, num_levels = (52, 2048) if bits.dtype == torch.int64 else (23, 256)
    num_rows = int(rows[-1]) + 1 if len(rows) else 0
    level = num_levels - 1 - (bits >> shift)
    count = torch.bincount(rows * num_levels + level, minlength=num_rows * num_levels).view(num_rows, num_levels)
    last_level = (count.cumsum(1) < topk).sum(1)
    return level <= last_level[rows]


def match(
    target_row: Tensor, target_score: Tensor, rows: Tensor, cells: Tensor, metric: Tensor, overlaps: Tensor,
    num_rows: int, rule: TaskAligned,
) -> None:  # fmt: skip
    """Choose the positives among the pairs (P,) of row and cell, a cell being an anchor of an image.

    Into ``target_row`` (cells,) int32 and ``target_score``, which say background, go the row of each and its target score.
    """
    num_cells = len(target_row)
    claims = topk_per_row(metric, rows, rule.topk)
    target_row[cells[claims]] = rows[claims].int()

    num_claims = torch.zeros(num_cells, dtype=torch.int32, device=rows.device)
    num_claims.index_add_(0, cells[claims], torch.ones_like(claims, dtype=torch.int32))
    contested = (num_claims > 1)[cells].nonzero().squeeze(1)
    best = overlaps.new_zeros(num_cells).scatter_reduce_(0, cells[contested], overlaps[contested], "amax")
    contested = contested[overlaps[contested] == best[cells[contested]]]
    target_row.scatter_reduce_(0, cells[contested], rows[contested].int(), "amin", include_self=False)

    positives = (target_row[cells] == rows).nonzero().squeeze(1)
    if rule.topk2 is not None:
        target_row[cells[positives]] = -1
        positives = positives[topk_per_row(metric[positives], rows[positives], rule.topk2)]
        target_row[cells[positives]] = rows[positives].int()

    cells, rows, metric, overlaps = cells[positives], rows[positives], metric[positives], overlaps[positives]
    max_metric = metric.new_zeros(num_rows).scatter_reduce_(0, rows, metric, "amax")
    max_overlap = metric.new_zeros(num_rows).scatter_reduce_(0, rows, overlaps, "amax")
    target_score[cells] = metric * max_overlap[rows] / (max_metric[rows] + rule.eps)


class _PointPairs(NamedTuple):
    """Every candidate pair (P,) of a row and a cell, with its metric and overlap."""

    rows: Tensor
    cells: Tensor
    metric: Tensor
    overlaps: Tensor


def _pairs_of_points(scores: Tensor, boxes: Tensor, points: Tensor, targets: list[Tensor], rule: TaskAligned) -> _PointPairs:
    """Pairs of anchors at arbitrary points in pixels."""
    batch_size, num_anchors, num_classes = scores.shape
    scores, boxes, points = working(scores), working(boxes), working(points)
    geometry = ORIENTED if boxes.shape[2] == 5 else AXIS_ALIGNED
    gt = GroundTruth(*[x.to(boxes.dtype) if x.is_floating_point() else x for x in targets])
    gt_boxes = gt.boxes_xywh if geometry is ORIENTED else gt.boxes_xyxy
    row_ids = valid_rows(gt, batch_size, num_classes)
    widened = geometry.widen(gt_boxes[row_ids], rule.min_box_side)
    nth, anchors = point_pairs(*geometry.bounds(widened), points)
    kept = geometry.is_inside(points[anchors].T, widened[nth].T, rule.eps)
    rows, anchors = row_ids[nth[kept]], anchors[kept]
    images = gt.image_index[rows]
    pair_scores = scores[images, anchors, gt.labels[rows]]
    metric, overlaps = pair_metric(pair_scores, boxes[images, anchors].T, gt_boxes[rows].T, rule.alpha, rule.beta, geometry)
    return _PointPairs(rows, images * num_anchors + anchors, metric, overlaps)


def task_aligned_assign(x: TaskAlignedAssign) -> TaskAlignedAssignment:
    pairs = _pairs_of_points(x.scores, x.boxes, x.points, x.targets, x.assigner)
    shape = x.scores.shape[:2]
    target_row = torch.full(shape, -1, dtype=torch.int32, device=x.scores.device)
    target_score = pairs.metric.new_zeros(shape)
    match(target_row.view(-1), target_score.view(-1), *pairs, len(x.targets[0]), x.assigner)
    return TaskAlignedAssignment(target_row, target_score)


def align_metric(x: AlignMetric) -> Metrics:
    rule = TaskAligned(1, None, x.alpha, x.beta, x.min_box_side, 1e-9)
    pairs = _pairs_of_points(x.scores, x.boxes, x.points, x.targets, rule)
    batch_size, num_anchors, _ = x.scores.shape
    metric, overlaps = pairs.metric.new_zeros(2, batch_size * x.num_slots, num_anchors).unbind(0)
    anchors = pairs.cells % num_anchors
    metric[pairs.rows, anchors], overlaps[pairs.rows, anchors] = pairs.metric, pairs.overlaps
    shape = (batch_size, x.num_slots, num_anchors)
    return Metrics(metric.view(shape), overlaps.view(shape).clone())


def select_topk_candidates(x: SelectTopk) -> Selected:
    positive = x.metric > 0 if x.mask_gt is None else (x.metric > 0) & x.mask_gt[..., None]
    selected = torch.zeros_like(positive, memory_format=torch.contiguous_format)
    pairs = positive.flatten(0, 1).nonzero()
    values = working(x.metric).flatten(0, 1)[pairs[:, 0], pairs[:, 1]]
    chosen = pairs[topk_per_row(values, pairs[:, 0].contiguous(), x.topk)]
    selected.flatten(0, 1)[chosen[:, 0], chosen[:, 1]] = True
    return Selected(selected)
