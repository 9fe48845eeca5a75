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
from .memory import flattened
from .oriented import axes, gaussian_overlap, gaussians, is_inside_oriented, span_oriented, upright_bounds, widen_oriented
from .pairs import point_pairs, valid_rows

_BLOCK = 1 << 17  # pairs at a time: their temporaries stay in the processor's cache


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
    axes: Callable[[Tensor], Tensor]
    """What tells which points are inside, in columns: (k, n) of boxes (4 or 5, n)."""
    span: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    """Where on the x axis these boxes begin and end at heights (n,), if that depends on the height."""
    is_inside: Callable[[Tensor, Tensor, float], Tensor]
    """Whether points (2, P) are inside these boxes."""
    columns: Callable[[Tensor], Tensor]
    """What an overlap is made of: (k, n) of boxes (4 or 5, n)."""
    overlap: Callable[[Tensor, Tensor], Tensor]
    """Of two such (k, P): (P,)."""


AXIS_ALIGNED = Geometry(
    widen, lambda boxes: (boxes[:, :2], boxes[:, 2:]), lambda boxes: boxes, None, is_inside,
    lambda boxes: boxes, lambda a, b: overlap(a.T, b.T, "ciou", 1e-7),
)  # fmt: skip
ORIENTED = Geometry(
    widen_oriented, upright_bounds, axes, span_oriented, is_inside_oriented, gaussians, gaussian_overlap
)  # fmt: skip


Finder = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From rectangles (n, 2) to (n, 2) around boxes, and the axes (k, n) of these, to (nth, anchors): all that are inside."""


class Pairs(NamedTuple):
    """Pairs (P,) of the nth of some rows and a cell, which is an anchor of an image, with their metric and overlap."""

    rows: Tensor
    nth: Tensor
    cells: Tensor
    metric: Tensor
    overlaps: Tensor


class Predictions(NamedTuple):
    """What every anchor predicts, and how pairs of it and a ground truth are found and measured."""

    scores: Tensor
    """Logits, or probabilities, of classes (B, A, C)."""
    are_logits: bool
    boxes: Tensor
    """What overlaps are made of: (k, B * A)."""
    geometry: Geometry
    rule: TaskAligned

    def pairs(self, rows: Tensor, gt: GroundTruth, find: Finder) -> Pairs:
        """Pair these rows with the anchors that ``find`` gives."""
        geometry, rule = self.geometry, self.rule
        boxes = (gt.boxes_xywh if geometry is ORIENTED else gt.boxes_xyxy)[rows]
        widened = geometry.widen(boxes, rule.min_box_side)
        nth, anchors = find(*geometry.bounds(widened), geometry.axes(widened.T))
        truths = geometry.columns(boxes.T)
        cells = (gt.image_index[rows] * self.scores.shape[1]).index_select(0, nth).add_(anchors)
        scores, step, first = flattened(self.scores, gt.image_index[rows], gt.labels[rows])
        metric, overlaps = truths.new_empty(2, len(nth))
        for start in range(0, len(nth), _BLOCK):
            block = slice(start, start + _BLOCK)
            own = nth[block]
            score = working(scores.index_select(0, first.index_select(0, own).add_(anchors[block], alpha=step)))
            truth, pred = truths.index_select(1, own), self.boxes.index_select(1, cells[block])
            overlap = geometry.overlap(truth, pred)
            overlap = overlap.nan_to_num_(0).clamp_(min=0)
            value = pair_metric(score.sigmoid() if self.are_logits else score, overlap, rule)
            overlaps[block], metric[block] = overlap, value.nan_to_num_(0, torch.inf).clamp_(min=0)
        return Pairs(rows, nth, cells, metric, overlaps)


def pair_metric(scores: Tensor, overlaps: Tensor, rule: TaskAligned) -> Tensor:
    """Metric (P,) of pairs with class scores (P,) and overlaps."""
    return power(scores, rule.alpha) * power(overlaps, rule.beta)


def power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent``, by products for the usual 6, which are several times faster."""
    return (x * x * x).square() if exponent == 6 else x.pow(exponent)


def topk_per_row(metric: Tensor, rows: Tensor, topk: int) -> Tensor:
    """Indices of the ``topk`` highest positive metrics of every row; of equal ones the earlier pair. Rows are in order.

    No metric is negative or NaN.
    """
    # Bits of floats that are not negative order as the floats do, and integers sort stably in linear time.
    bits = metric.view(torch.int64 if metric.dtype == torch.float64 else torch.int32)
    kept = _reaches_topk(bits, rows, topk).nonzero().squeeze(1)
    kept = kept[bits[kept] > 0]
    bits, rows = bits[kept], rows[kept]
    by_metric = (torch.iinfo(bits.dtype).max - bits).sort(stable=True).indices
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
    return level <= last_level.index_select(0, rows)


def match(
    target_row: Tensor, target_score: Tensor, rows: Tensor, nth: Tensor, cells: Tensor, metric: Tensor, overlaps: Tensor,
    rule: TaskAligned,
) -> None:  # fmt: skip
    """Choose the positives among the pairs (P,) of the nth row and a cell, which is an anchor of an image.

    Into ``target_row`` (cells,) int32 and ``target_score``, which say background, go the row of each and its target score.
    """
    num_cells = len(target_row)
    claims = topk_per_row(metric, nth, rule.topk)
    owner = torch.empty_like(target_row).index_put_((cells[claims],), nth[claims].int())

    num_claims = torch.zeros(num_cells, dtype=torch.int32, device=rows.device)
    num_claims.index_add_(0, cells[claims], torch.ones_like(claims, dtype=torch.int32))
    contested = (num_claims > 1).index_select(0, cells).nonzero().squeeze(1)
    best = overlaps.new_zeros(num_cells).scatter_reduce_(0, cells[contested], overlaps[contested], "amax")
    contested = contested[overlaps[contested] == best[cells[contested]]]
    owner.scatter_reduce_(0, cells[contested], nth[contested].int(), "amin", include_self=False)

    positives = torch.cat([claims[num_claims[cells[claims]] == 1], contested])
    positives = positives[owner[cells[positives]] == nth[positives]].sort().values
    if rule.topk2 is not None:
        positives = positives[topk_per_row(metric[positives], nth[positives], rule.topk2)]

    cells, nth, metric, overlaps = cells[positives], nth[positives], metric[positives], overlaps[positives]
    max_metric = metric.new_zeros(len(rows)).scatter_reduce_(0, nth, metric, "amax")
    max_overlap = metric.new_zeros(len(rows)).scatter_reduce_(0, nth, overlaps, "amax")
    target_row[cells] = rows[nth].int()
    target_score[cells] = metric * max_overlap[nth] / (max_metric[nth] + rule.eps)


def _pairs_of_points(scores: Tensor, boxes: Tensor, points: Tensor, targets: list[Tensor], rule: TaskAligned) -> Pairs:
    """Pairs of anchors at arbitrary points in pixels."""
    batch_size, _, num_classes = scores.shape
    scores, boxes, points = working(scores), working(boxes), working(points)
    geometry = ORIENTED if boxes.shape[2] == 5 else AXIS_ALIGNED
    gt = GroundTruth(*[x.to(boxes.dtype) if x.is_floating_point() else x for x in targets])
    boxes = geometry.columns(boxes.flatten(0, 1).T)
    preds, by_axis = Predictions(scores, False, boxes, geometry, rule), points.T.contiguous()

    def find(low: Tensor, high: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
        nth, anchors = point_pairs(low, high, points)
        blocks = zip(nth.split(_BLOCK), anchors.split(_BLOCK), strict=True)
        is_inside = [geometry.is_inside(by_axis.index_select(1, at), axes.index_select(1, own), rule.eps) for own, at in blocks]
        kept = torch.cat(is_inside).nonzero().squeeze(1)
        return nth[kept], anchors[kept]

    return preds.pairs(valid_rows(gt, batch_size, num_classes), gt, find)


def task_aligned_assign(x: TaskAlignedAssign) -> TaskAlignedAssignment:
    pairs = _pairs_of_points(x.scores, x.boxes, x.points, x.targets, x.assigner)
    shape = x.scores.shape[:2]
    target_row = torch.full(shape, -1, dtype=torch.int32, device=x.scores.device)
    target_score = pairs.metric.new_zeros(shape)
    match(target_row.view(-1), target_score.view(-1), *pairs, x.assigner)
    return TaskAlignedAssignment(target_row, target_score)


def align_metric(x: AlignMetric) -> Metrics:
    rule = TaskAligned(1, None, x.alpha, x.beta, x.min_box_side, 1e-9)
    pairs = _pairs_of_points(x.scores, x.boxes, x.points, x.targets, rule)
    batch_size, num_anchors, _ = x.scores.shape
    metric, overlaps = pairs.metric.new_zeros(2, batch_size * x.num_slots, num_anchors).unbind(0)
    at = pairs.rows[pairs.nth], pairs.cells % num_anchors
    metric[at], overlaps[at] = pairs.metric, pairs.overlaps
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
