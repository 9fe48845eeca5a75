"""The YOLO11-OBB criterion: BCE on every class logit; ProbIoU, distribution focal loss and the angle on the positives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .anchors import make_anchors
from .boxes import working_precision
from .finite import poison
from .oriented import ORIENTED, decode_oriented, is_oriented_box, prob_iou, sides_from
from .targets import pad_targets
from .task_aligned import TaskAlignedResult, task_aligned_assign
from .yolo11 import class_loss, distance_loss

MIN_SIDE_PX = 2.0
"""Ground truths with a shorter side are ignored."""
FLOOR = 0.01
"""Added to the variances of both boxes in the loss, in square cells."""


class YOLO11OBBLossOutput(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    angle: Tensor
    num_fg: Tensor


def is_target(boxes: Tensor) -> Tensor:
    """Which boxes (..., 5) in pixels count."""
    return is_oriented_box(boxes) & (boxes[..., 2:4] >= MIN_SIDE_PX).all(-1)


def angle_loss(pred: Tensor, target: Tensor) -> Tensor:
    """sin^2 of twice the angle between boxes (M, 5), the less the longer the target is: (M,). A quarter turn costs nothing."""
    elongation = torch.log((target[:, 2] + 1e-9) / (target[:, 3] + 1e-9))
    return torch.sin(2 * (pred[:, 4] - target[:, 4])) ** 2 * torch.exp(-(elongation**2) / 9)


def yolo11_obb_assign(
    pred_dist: Tensor,
    pred_angle: Tensor,
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
    """Assign the rows of ``targets`` (N, 7) to the anchors of the detached predictions, in pixels."""
    pred_dist, pred_angle, pred_scores = (working_precision(x.detach()) for x in (pred_dist, pred_angle, pred_scores))
    points, point_strides = make_anchors(feat_shapes, strides, dtype=pred_dist.dtype, device=pred_dist.device)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    labels, boxes, mask = pad_targets(targets.to(pred_dist.dtype), pred_dist.shape[0], imgsz, is_target)
    return task_aligned_assign(
        pred_scores.sigmoid(),
        decode_oriented(pred_dist, pred_angle, points, reg_max=reg_max, strides=point_strides),
        points * point_strides[:, None],
        labels, boxes, mask,
        topk=topk, topk2=topk2, alpha=alpha, beta=beta, min_box_side=min_box_side, geometry=ORIENTED,
    )  # fmt: skip


def yolo11_obb_loss(
    pred_dist: Tensor,
    pred_angle: Tensor,
    pred_scores: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    reg_max: int = 16,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
    angle_gain: float = 1.0,
    class_weights: Tensor | None = None,
    assignment: TaskAlignedResult | None = None,
    **assigner_options: float | None,
) -> YOLO11OBBLossOutput:
    """The whole criterion of angles (B, A, 1) in radians; ``assignment`` replaces the assigner's result if given."""
    if assignment is None:
        assignment = yolo11_obb_assign(
            pred_dist, pred_angle, pred_scores, feat_shapes, targets, strides=strides, reg_max=reg_max, **assigner_options
        )
    preds = dist, pred_angle, logits = tuple(working_precision(x) for x in (pred_dist, pred_angle, pred_scores))
    points, point_strides = make_anchors(feat_shapes, strides, dtype=dist.dtype, device=dist.device)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    normaliser = assignment.target_scores.sum().clamp(min=1)
    cls = class_loss(logits, assignment.target_scores, class_weights) / normaliser

    fg = assignment.fg_mask
    _, anchor = fg.nonzero(as_tuple=True)
    score = assignment.target_scores.sum(-1)[fg]
    gt, gt_angle = assignment.target_bboxes[fg].split([4, 1], -1)
    gt_cell = torch.cat([gt / point_strides[anchor][:, None], gt_angle], -1)
    pred_cell = decode_oriented(dist, pred_angle, points, reg_max=reg_max)[fg]
    box = ((1 - prob_iou(pred_cell, gt_cell, floor=FLOOR)) * score).sum() / normaliser
    target = sides_from(points[anchor], gt_cell)
    dfl = (distance_loss(dist[fg], target, reg_max, point_strides[anchor], imgsz) * score).sum() / normaliser
    angle = (angle_loss(pred_cell, gt_cell) * score).sum() / normaliser

    # A prediction that is not finite shows even where no formula reads it.
    not_finite = poison(torch.stack([x.isfinite().all() for x in preds]).all(), *preds)
    terms = [
        gain * term + not_finite
        for gain, term in zip((box_gain, cls_gain, dfl_gain, angle_gain), (box, cls, dfl, angle), strict=True)
    ]
    return YOLO11OBBLossOutput(len(logits) * sum(terms), *(term.detach() for term in terms), fg.sum())
