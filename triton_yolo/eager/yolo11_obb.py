"""YOLO11's assignment and loss of oriented boxes: where they differ from those of axis-aligned ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._precision import working
from .._signatures import (
    FLOOR,
    MIN_SIDE_PX,
    YOLO11OBB,
    GradDistAngleScores,
    YOLO11Assignment,
    YOLO11OBBAssign,
    YOLO11OBBLoss,
    YOLO11OBBLossBackward,
    YOLO11OBBLossOutputs,
    YOLO11OBBOutputs,
)
from .finite import is_finite
from .oriented import ProbOverlap, turned
from .pairs import anchor_table
from .task_aligned import ORIENTED
from .yolo11 import Positives, assign, expected_distances, gradients_of, loss_of


def yolo11_obb_assign(x: YOLO11OBBAssign) -> YOLO11Assignment:
    points, point_strides = anchor_table(x.levels, x.pred_dist)
    (distances, are_finite), angles = expected_distances(x.pred_dist, x.reg_max), working(x.pred_angle.squeeze(-1))
    left_top, right_bottom = distances.chunk(2)
    centres = (points[:, None] + turned((right_bottom - left_top) / 2, angles)) * point_strides
    boxes = torch.cat([centres, (left_top + right_bottom) * point_strides, angles[None]])
    return assign(x, are_finite & is_finite(x.pred_angle), boxes.flatten(1), ORIENTED, MIN_SIDE_PX)


def yolo11_obb_criterion(x: YOLO11OBB) -> YOLO11OBBOutputs:
    row, score, sums, num_fg, labels, boxes = yolo11_obb_assign(
        YOLO11OBBAssign(x.pred_dist, x.pred_angle, x.pred_scores, x.targets, x.levels, x.reg_max, x.assigner)
    )
    preds, options = (x.pred_dist, x.pred_angle, x.pred_scores), (x.levels, x.reg_max, x.gains)
    given = YOLO11OBBLoss(*preds, row, score, sums.clamp(min=1), labels, boxes, x.class_weights, *options)
    pos = OrientedPositives(given)
    loss, box, cls, dfl, angle, held = loss_of(given, pos)
    if not x.wants_grad:
        return YOLO11OBBOutputs(loss, box, cls, dfl, angle, num_fg, *(pred.new_empty(0) for pred in preds))
    return YOLO11OBBOutputs(loss, box, cls, dfl, angle, num_fg, *gradients_of(given, pos, held[1] / held[0]))


def yolo11_obb_loss(x: YOLO11OBBLoss) -> YOLO11OBBLossOutputs:
    return YOLO11OBBLossOutputs(*loss_of(x, OrientedPositives(x)))


def yolo11_obb_loss_backward(x: YOLO11OBBLossBackward) -> GradDistAngleScores:
    return GradDistAngleScores(*gradients_of(x, OrientedPositives(x), x.grad * x.held[1] / x.held[0]))


class OrientedPositives(Positives):
    """Boxes (M, 5), and distances along the axes of boxes: of predicted ones by their own angles, of true ones by theirs."""

    def __init__(self, x: YOLO11OBBLoss | YOLO11OBBLossBackward) -> None:
        self.more_preds = (x.pred_angle,)
        super().__init__(x)

    def locate(self, points: Tensor, gt_boxes: Tensor, stride: Tensor) -> None:
        angle = working(self.more_preds[0][self.images, self.anchors])
        left_top, right_bottom = self.distances.chunk(2, -1)
        self.offset = turned(((right_bottom - left_top) / 2).T, angle[:, 0]).T
        self.boxes = torch.cat([points + self.offset, left_top + right_bottom, angle], -1)
        self.gt_boxes = torch.cat([gt_boxes[:, :4] / stride, gt_boxes[:, 4:]], -1)
        self.similarity = ProbOverlap(self.boxes, self.gt_boxes, 1e-7, FLOOR)
        from_centre = turned((points - self.gt_boxes[:, :2]).T, -gt_boxes[:, 4]).T
        half = self.gt_boxes[:, 2:4] / 2
        self.target_distances = torch.cat([half + from_centre, half - from_centre], -1)
        self.cos, self.sin = (angle - gt_boxes[:, 4:]).cos(), (angle - gt_boxes[:, 4:]).sin()
        width, height = (gt_boxes[:, 2:4] / stride + 1e-9).split(1, -1)
        self.roundness = torch.exp(-((width / height).log() / 3).square())

    def losses(self) -> list[Tensor]:
        box = 1 - self.similarity.value()
        angle = (2 * self.sin * self.cos).square() * self.roundness
        return [box, angle[:, 0]]

    def gradients(self, gains: Sequence[float], weight: Tensor) -> list[Tensor]:
        grad_boxes = -gains[0] * weight * self.similarity.derivative()
        grad_centre, grad_size, grad_angle = grad_boxes.split([2, 2, 1], -1)
        grad_offset = turned(grad_centre.T, -self.boxes[:, 4]).T / 2
        (x, y), (grad_x, grad_y) = self.offset.split(1, -1), grad_centre.split(1, -1)
        slope = 8 * self.sin * self.cos * (self.cos.square() - self.sin.square()) * self.roundness
        return [
            torch.cat([grad_size - grad_offset, grad_size + grad_offset], -1),
            grad_angle + x * grad_y - y * grad_x + gains[3] * weight * slope,
        ]
