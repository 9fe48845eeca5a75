"""The YOLO11 criterion: BCE on every class logit, CIoU and distribution focal loss on the positives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .anchors import make_anchors
from .boxes import bbox_iou, working_precision, xywh_to_xyxy
from .dfl import decode_dfl, dfl_loss, distances_to_sides
from .finite import poison
from .targets import pad_targets
from .task_aligned import TaskAlignedResult, task_aligned_assign


class YOLO11LossOutput(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    num_fg: Tensor


def yolo11_assign(
    pred_dist: Tensor,
    pred_scores: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    reg_max: int = 16,
    topk: int = 10,
    topk2: int | None = None,
    alpha: float = 0.5,
    beta: float = 6.0,
    min_box_side: float = 0.0,
) -> TaskAlignedResult:
    """Assign the rows of ``targets`` (N, 6) to the anchors of the detached predictions, in pixels."""
    pred_dist, pred_scores = working_precision(pred_dist.detach()), working_precision(pred_scores.detach())
    points, point_strides = make_anchors(feat_shapes, strides, dtype=pred_dist.dtype, device=pred_dist.device)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    labels, boxes, mask = pad_targets(targets.to(pred_dist.dtype), pred_dist.shape[0], imgsz)
    return task_aligned_assign(
        pred_scores.sigmoid(),
        decode_dfl(pred_dist, points, reg_max=reg_max, strides=point_strides),
        points * point_strides[:, None],
        labels, xywh_to_xyxy(boxes), mask,
        topk=topk, topk2=topk2, alpha=alpha, beta=beta, min_box_side=min_box_side,
    )  # fmt: skip


def class_loss(logits: Tensor, target_scores: Tensor, class_weights: Tensor | None) -> Tensor:
    """Binary cross entropy of every logit, by the weights of their classes if given: the sum."""
    bce = F.binary_cross_entropy_with_logits(logits, target_scores.to(logits.dtype), reduction="none")
    return bce.sum() if class_weights is None else (bce * class_weights.to(bce)).sum()


def distance_loss(dist: Tensor, target: Tensor, reg_max: int, strides: Tensor, imgsz: tuple[float, float]) -> Tensor:
    """Of distances (M, 4R) to targets (M, 4) in cells: DFL, or L1 in sides of the image if there is one bin; (M,)."""
    if reg_max > 1:
        return dfl_loss(dist.unflatten(-1, (4, reg_max)), target)
    height, width = imgsz
    per_image = strides[:, None] / dist.new_tensor([width, height, width, height])
    return ((dist - target) * per_image).abs().mean(-1)


def yolo11_loss(
    pred_dist: Tensor,
    pred_scores: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    reg_max: int = 16,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
    class_weights: Tensor | None = None,
    assignment: TaskAlignedResult | None = None,
    **assigner_options: float | None,
) -> YOLO11LossOutput:
    """The whole criterion; ``assignment`` replaces the assigner's result if given."""
    if assignment is None:
        assignment = yolo11_assign(
            pred_dist, pred_scores, feat_shapes, targets, strides=strides, reg_max=reg_max, **assigner_options
        )
    logits, dist = working_precision(pred_scores), working_precision(pred_dist)
    batch_size = logits.shape[0]
    points, point_strides = make_anchors(feat_shapes, strides, dtype=dist.dtype, device=dist.device)
    normaliser = assignment.target_scores.sum().clamp(min=1)

    cls = class_loss(logits, assignment.target_scores, class_weights) / normaliser

    fg = assignment.fg_mask
    _, anchor = fg.nonzero(as_tuple=True)
    score = assignment.target_scores.sum(-1)[fg]
    gt_cell = assignment.target_bboxes[fg] / point_strides[anchor][:, None]
    pred_cell = decode_dfl(dist, points, reg_max=reg_max)[fg]
    box = ((1 - bbox_iou(pred_cell, gt_cell, kind="ciou")) * score).sum() / normaliser
    target = distances_to_sides(points[anchor], gt_cell)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    side_loss = distance_loss(dist[fg], target, reg_max, point_strides[anchor], imgsz)
    dfl = (side_loss * score).sum() / normaliser

    # A logit that is not finite shows even where no formula reads it.
    not_finite = poison(dist.isfinite().all() & logits.isfinite().all(), dist, logits)
    box, cls, dfl = box_gain * box + not_finite, cls_gain * cls + not_finite, dfl_gain * dfl + not_finite
    return YOLO11LossOutput(batch_size * (box + cls + dfl), box.detach(), cls.detach(), dfl.detach(), fg.sum())
