"""YOLO11's assignment from raw predictions, and its loss with the one-hot target implied."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import working, working_dtype
from .._signatures import (
    YOLO11,
    GradDistScores,
    YOLO11Assign,
    YOLO11Assignment,
    YOLO11Loss,
    YOLO11LossBackward,
    YOLO11LossOutputs,
    YOLO11OBBAssign,
    YOLO11OBBLoss,
    YOLO11OBBLossBackward,
    YOLO11Outputs,
)
from .boxes import overlap, overlap_derivative
from .decode import boxes_from_distances, distances_grad, expectation, expectation_backward
from .finite import Extremes
from .memory import blocks, untouched_zeros_like
from .pairs import Shape, anchor_table, by_images, grid_pairs, valid_rows
from .targets import ground_truth
from .task_aligned import AXIS_ALIGNED, Geometry, Predictions, match

_LINEAR_FROM = 40  # where softplus(x) is x in any type
_PART = 1 << 20  # logits of distances that are decoded at once
_LOW = 20  # where four factors exp(x) are finite in any type

Given = YOLO11Loss | YOLO11LossBackward | YOLO11OBBLoss | YOLO11OBBLossBackward


def yolo11_assign(x: YOLO11Assign) -> YOLO11Assignment:
    points, point_strides = anchor_table(x.levels, x.pred_dist)
    distances, is_finite = expected_distances(x.pred_dist, x.reg_max)
    distances[:2].neg_()
    boxes = distances.unflatten(0, (2, 2)).add_(points[:, None]).mul_(point_strides)
    return assign(x, is_finite, boxes.flatten(0, 1).flatten(1), AXIS_ALIGNED)


def expected_distances(pred_dist: Tensor, reg_max: int) -> tuple[Tensor, Tensor]:
    """Of all anchors (4, B, A), and whether all logits are finite. Sums over the first axis are fast along the second."""
    bins = torch.arange(reg_max, dtype=working_dtype(pred_dist.dtype), device=pred_dist.device)
    sums, distances = torch.stack([bins, torch.ones_like(bins)]), bins.new_empty(4, *pred_dist.shape[:2])
    ends = Extremes(bins)
    images = max(1, _PART // max(1, pred_dist[:1].numel()))
    for first in range(0, len(pred_dist), images):
        part = slice(first, first + images)
        logits = working(pred_dist[part].transpose(1, 2)).unflatten(1, (4, reg_max))
        ends.add(logits)
        if reg_max == 1:
            distances[:, part] = logits.squeeze(2).transpose(0, 1)
        else:
            powers = (logits - logits.amax(2, keepdim=True)).mul_(1 / math.log(2)).exp2_()
            weighted, total = (sums @ powers).unbind(2)
            torch.div(weighted.transpose(0, 1), total.transpose(0, 1), out=distances[:, part])
    return distances, ends.are_finite()


def assign(
    x: YOLO11Assign | YOLO11OBBAssign, is_finite: Tensor, boxes: Tensor, geometry: Geometry, min_side: float = 0.0
) -> YOLO11Assignment:
    """Assign to predicted boxes (4 or 5, B * A) in pixels, made of what ``is_finite``; ``min_side`` is of ground truth."""
    batch_size, num_anchors, num_classes = x.pred_scores.shape
    gt = ground_truth(x.targets, x.levels, boxes.dtype)
    valid = valid_rows(gt, batch_size, num_classes, min_side)
    shape = (batch_size, num_anchors)
    target_row = torch.full(shape, -1, dtype=torch.int32, device=boxes.device).flatten()
    target_score = boxes.new_zeros(shape).flatten()
    gt_boxes = gt.boxes_xyxy if len(boxes) == 4 else gt.boxes_xywh
    preds = Predictions(x.pred_scores, True, geometry.columns(boxes), geometry, x.assigner)
    low, high = geometry.bounds(gt_boxes)
    # About so many anchors lie in a box; no more than there are, however large it is.
    num_pairs = ((high - low).prod(1) / min(x.levels.strides) ** 2).ceil().clamp(max=num_anchors).long()

    def find(low: Tensor, high: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
        shape = Shape(axes, geometry.span, lambda points, axes: geometry.is_inside(points, axes, x.assigner.eps))
        return grid_pairs(low, high, x.levels, shape)

    for rows in by_images(valid, gt.image_index, num_pairs, batch_size):
        pairs = preds.pairs(rows, gt, find)
        match(target_row, target_score, *pairs, x.assigner)
    # A logit that is not finite shows in the loss even where no formula reads it.
    score_sum = target_score.sum().where(is_finite, torch.nan)
    sums = torch.stack([score_sum, torch.full_like(score_sum, batch_size)])
    num_fg = (target_row >= 0).sum()
    labels, gt_boxes = gt.labels.clone(), gt_boxes.clone()  # nothing that an operator puts out is part of what it took
    return YOLO11Assignment(target_row.view(shape), target_score.view(shape), sums, num_fg, labels, gt_boxes)


def yolo11_criterion(x: YOLO11) -> YOLO11Outputs:
    row, score, sums, num_fg, labels, boxes = yolo11_assign(
        YOLO11Assign(x.pred_dist, x.pred_scores, x.targets, x.levels, x.reg_max, x.assigner)
    )
    options = x.class_weights, x.levels, x.reg_max, x.gains
    given = YOLO11Loss(x.pred_dist, x.pred_scores, row, score, sums.clamp(min=1), labels, boxes, *options)
    pos = Positives(given)
    loss, box, cls, dfl, held = loss_of(given, pos)
    row = row if x.wants_row else row.new_empty(0)
    if not x.wants_grad:
        return YOLO11Outputs(loss, box, cls, dfl, num_fg, row, x.pred_dist.new_empty(0), x.pred_scores.new_empty(0))
    grads = gradients_of(given, pos, held[1] / held[0])
    return YOLO11Outputs(loss, box, cls, dfl, num_fg, row, *grads)


def yolo11_loss(x: YOLO11Loss) -> YOLO11LossOutputs:
    return YOLO11LossOutputs(*loss_of(x, Positives(x)))


def yolo11_loss_backward(x: YOLO11LossBackward) -> GradDistScores:
    return GradDistScores(*gradients_of(x, Positives(x), x.grad * x.held[1] / x.held[0]))


def loss_of(x: YOLO11Loss | YOLO11OBBLoss, pos: "Positives") -> list[Tensor]:
    """The loss, its terms, and the normaliser for backward."""
    per_class = pos.scores.new_zeros(x.pred_scores.shape[2])
    ends = Extremes(per_class)
    for block in blocks(x.pred_scores):
        logits = working(x.pred_scores[block])
        is_low = bool(ends.add(logits) < _LOW)
        per_class[block[2]] += _softplus_sum(logits, is_low)
    normaliser = x.normaliser.where(ends.are_finite(), torch.nan)
    logits = working(x.pred_scores[pos.images, pos.anchors, pos.labels])
    cls = _weighted(per_class, x.class_weights).nansum()  # a class without a weight costs nothing, also where its sum overflows
    hits = _weighted(logits * pos.scores, x.class_weights, pos.labels).sum()
    cls = torch.where(cls < torch.inf, cls - hits, cls)  # a sum of finite numbers that overflows is not NaN

    box, *others = pos.losses()
    if x.reg_max > 1:
        log_p = F.log_softmax(pos.logits, -1)
        low, weight_low, weight_high = pos.soft_bins()
        log_p, weights = log_p.gather(-1, torch.cat([low, low + 1], -1)), torch.stack([weight_low, weight_high], -1)
        side = -(log_p * weights).where(weights > 0, 0).sum(-1)  # -inf without a weight counts 0
    else:
        side = (pos.distances - pos.target_distances).abs() * pos.image_share
    box, dfl, *others = [(loss * pos.scores).sum() for loss in (box, side.mean(-1), *others)]
    sums = box, cls, dfl, *others
    # A gain of 0 turns a term off, also where the sum overflows.
    weighted = [gain * total if gain > 0 else torch.zeros_like(total) for gain, total in zip(x.gains, sums, strict=True)]
    terms = [total / normaliser[0] for total in weighted]
    return [normaliser[1] * torch.stack(terms).sum(), *terms, normaliser]


def gradients_of(x: Given, pos: "Positives", scale: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all predictions, in their layout; ``scale`` () multiplies that of every sum over anchors."""
    preds = x.pred_dist, *pos.more_preds, x.pred_scores
    if scale.isnan():
        return tuple([torch.full_like(pred, torch.nan) for pred in preds])
    cls_gain, dfl_gain = x.gains[1:3]
    grad_scores = torch.empty_like(x.pred_scores)
    slope = _weighted((cls_gain * scale).expand(x.pred_scores.shape[2]), x.class_weights)
    # slope * sigmoid(logits) in one pass
    if x.pred_scores.dtype == slope.dtype:
        args = slope.expand_as(grad_scores), x.pred_scores, 1, _LINEAR_FROM
        torch.ops.aten.softplus_backward.grad_input(*args, grad_input=grad_scores)
    else:
        for block in blocks(x.pred_scores):
            logits = working(x.pred_scores[block])
            grad_scores[block] = torch.ops.aten.softplus_backward(slope[block[2]].expand_as(logits), logits, 1, _LINEAR_FROM)
    at_label = (pos.images, pos.anchors, pos.labels)
    error = working(x.pred_scores[at_label]).sigmoid() - pos.scores
    grad_scores[at_label] = (_weighted(error, x.class_weights, pos.labels) * (cls_gain * scale)).to(grad_scores.dtype)

    weight = (pos.scores * scale)[:, None]
    grad_distances, *others = pos.gradients(x.gains, weight)
    if x.reg_max == 1:
        side = torch.sign(pos.distances - pos.target_distances) * pos.image_share
        grad_distances = grad_distances + dfl_gain / 4 * weight * side
    grad_logits = expectation_backward(grad_distances, pos.probs, pos.distances)
    if x.reg_max > 1:
        low, weight_low, weight_high = pos.soft_bins()
        # In place: nobody needs the probabilities any more.
        error = pos.probs.scatter_add_(-1, low, -weight_low[..., None]).scatter_add_(-1, low + 1, -weight_high[..., None])
        grad_logits = grad_logits.addcmul_(dfl_gain / 4 * weight[..., None], error)
    grads = [untouched_zeros_like(pred) for pred in preds[:-1]]
    for grad, at_positives in zip(grads, (grad_logits.flatten(-2), *others), strict=True):
        grad[pos.images, pos.anchors] = at_positives.to(grad.dtype)
    return *grads, grad_scores


class Positives:
    """The positive anchors (M) with what both directions need of them: boxes and distances in cells."""

    more_preds: tuple[Tensor, ...] = ()
    """What boxes are made of beside distances."""

    def __init__(self, x: Given) -> None:
        points, point_strides = anchor_table(x.levels, x.pred_dist)
        self.images, self.anchors = (x.target_row >= 0).nonzero().unbind(-1)
        rows = x.target_row[self.images, self.anchors].long()
        self.labels, self.scores = x.gt_labels[rows], x.target_score[self.images, self.anchors]
        self.logits = working(x.pred_dist[self.images, self.anchors]).unflatten(-1, (4, x.reg_max))
        self.probs, self.distances = expectation(self.logits)
        points, stride = points.T[self.anchors], point_strides[self.anchors][:, None]
        self.locate(points, x.gt_boxes.to(points.dtype)[rows], stride)
        height, width = x.levels.image_size
        self.image_share = stride / points.new_tensor([width, height, width, height])

    def locate(self, points: Tensor, gt_boxes: Tensor, stride: Tensor) -> None:
        """Find the boxes around ``points`` (M, 2), and how far the sides of true ones (M, 4) in pixels are from them."""
        self.boxes = boxes_from_distances(points, self.distances)
        self.gt_boxes = gt_boxes / stride
        self.target_distances = torch.cat([points - self.gt_boxes[:, :2], self.gt_boxes[:, 2:] - points], -1)

    def losses(self) -> list[Tensor]:
        """Of each box (M,), and, one a term, what else there is but classes and distances."""
        return [1 - overlap(self.boxes, self.gt_boxes, "ciou", 1e-7)]

    def gradients(self, gains: Sequence[float], weight: Tensor) -> list[Tensor]:
        """Gradients of these losses by the distances (M, 4), and by ``more_preds`` (M, n); they are weighted by (M, 1)."""
        return [distances_grad(-gains[0] * weight * overlap_derivative(self.boxes, self.gt_boxes, "ciou", 1e-7))]

    def soft_bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lower bin (M, 4, 1) around each target distance, and the weights (M, 4) of it and of the next."""
        distances = self.target_distances.clamp(0, self.probs.shape[-1] - 1 - 0.01)
        low = distances.floor()
        return low.long()[..., None], low + 1 - distances, distances - low


def _softplus_sum(logits: Tensor, is_low: bool) -> Tensor:
    """Sums (C,) of softplus of (b, n, C): of four factors 1 + exp(logit) at a time, if none is ``_LOW`` or above."""
    number = logits.shape[1] // 4 * 4 if is_low else 0
    single = F.softplus(logits[:, number:], threshold=_LINEAR_FROM).sum((0, 1))
    product = (logits[:, :number] * (1 / math.log(2))).exp2_()
    for _ in range(2):
        a, b = product.chunk(2, 1)
        product = (a + b).addcmul_(a, b)  # (1 + a) (1 + b) - 1, exact for small ones
    return product.log1p_().sum((0, 1)).add_(single)


def _weighted(x: Tensor, class_weights: Tensor | None, index: Tensor | None = None) -> Tensor:
    if class_weights is None:
        return x
    weights = class_weights.to(x.dtype)
    return x * (weights if index is None else weights[index])
