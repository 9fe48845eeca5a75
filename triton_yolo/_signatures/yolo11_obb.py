"""YOLO11's criterion of oriented boxes: whole, and in two parts. What is not told here is as of ``yolo11``.

Boxes of ground truth are (N, 5): centre and size, and the angle in radians.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .common import Levels, TaskAligned, new_ground_truth, of_anchors, wider
from .yolo11 import YOLO11Assignment

MIN_SIDE_PX = 2.0
"""Ground truths with a shorter side are ignored."""
FLOOR = 0.01
"""Added to the variances of both boxes in the loss, in square cells."""


class YOLO11OBBAssign(NamedTuple):
    """Logits (B, A, 4R), angles (B, A, 1) and logits (B, A, C)."""

    pred_dist: Tensor
    pred_angle: Tensor
    pred_scores: Tensor
    targets: list[Tensor]
    levels: Levels
    reg_max: int
    assigner: TaskAligned

    def allocate(self) -> YOLO11Assignment:
        dist, dtype = self.pred_dist, wider(self.pred_dist, self.pred_angle, self.pred_scores)
        gt = new_ground_truth(self.targets, dtype)
        return YOLO11Assignment(
            of_anchors(dist, torch.int32), of_anchors(dist, dtype), dist.new_empty(2, dtype=dtype),
            dist.new_empty((), dtype=torch.int64), gt.labels, gt.boxes_xywh,
        )  # fmt: skip


class YOLO11OBBLossOutputs(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    angle: Tensor
    held: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:5]


class YOLO11OBBLoss(NamedTuple):
    pred_dist: Tensor
    pred_angle: Tensor
    pred_scores: Tensor
    target_row: Tensor
    target_score: Tensor
    normaliser: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor
    class_weights: Tensor | None
    levels: Levels
    reg_max: int
    gains: tuple[float, ...]

    def allocate(self) -> YOLO11OBBLossOutputs:
        dtype = self.target_score.dtype
        return YOLO11OBBLossOutputs(*(self.pred_dist.new_empty(shape, dtype=dtype) for shape in ((), (), (), (), (), 2)))


class GradDistAngleScores(NamedTuple):
    grad_pred_dist: Tensor
    grad_pred_angle: Tensor
    grad_pred_scores: Tensor


class YOLO11OBBLossBackward(NamedTuple):
    grad: Tensor
    pred_dist: Tensor
    pred_angle: Tensor
    pred_scores: Tensor
    target_row: Tensor
    target_score: Tensor
    held: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor
    class_weights: Tensor | None
    levels: Levels
    reg_max: int
    gains: tuple[float, ...]
    backend: str

    def allocate(self) -> GradDistAngleScores:
        return GradDistAngleScores(*map(torch.empty_like, (self.pred_dist, self.pred_angle, self.pred_scores)))


class YOLO11OBBOutputs(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    angle: Tensor
    num_fg: Tensor
    grad_pred_dist: Tensor
    grad_pred_angle: Tensor
    grad_pred_scores: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:5]


class YOLO11OBB(NamedTuple):
    pred_dist: Tensor
    pred_angle: Tensor
    pred_scores: Tensor
    targets: list[Tensor]
    class_weights: Tensor | None
    levels: Levels
    reg_max: int
    assigner: TaskAligned
    gains: tuple[float, ...]
    wants_grad: bool

    def allocate(self) -> YOLO11OBBOutputs:
        dist, preds = self.pred_dist, (self.pred_dist, self.pred_angle, self.pred_scores)
        loss = dist.new_empty((), dtype=working_dtype(dist.dtype))
        num_fg = dist.new_empty((), dtype=torch.int64)
        grads = (torch.empty_like(x) if self.wants_grad else x.new_empty(0) for x in preds)
        terms = [torch.empty_like(loss) for _ in range(4)]
        return YOLO11OBBOutputs._make((loss, *terms, num_fg, *grads))
