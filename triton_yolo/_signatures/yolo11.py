"""Task-aligned assignment, and YOLO11's criterion: whole, and in two parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .common import Levels, TaskAligned, new_ground_truth, of_anchors, wider


class TaskAlignedAssignment(NamedTuple):
    target_row: Tensor
    target_score: Tensor


class TaskAlignedAssign(NamedTuple):
    """Class probabilities (B, A, C) and boxes (B, A, 4) at arbitrary points (A, 2) in pixels.

    Oriented boxes are (B, A, 5), and those of the targets, behind upright rectangles of the same centres and sides, (N, 5).
    """

    scores: Tensor
    boxes: Tensor
    points: Tensor
    targets: list[Tensor]
    assigner: TaskAligned

    def allocate(self) -> TaskAlignedAssignment:
        return TaskAlignedAssignment(
            of_anchors(self.scores, torch.int32), of_anchors(self.scores, wider(self.scores, self.boxes))
        )


class YOLO11Assignment(NamedTuple):
    """An assignment; sum of the target scores and number of images (2,); number of positives; label and box of every row.

    The sum is NaN if any of ``pred_dist`` is not finite: this is the pass that reads all of it.
    """

    target_row: Tensor
    target_score: Tensor
    sums: Tensor
    num_fg: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor


class YOLO11Assign(NamedTuple):
    """Logits (B, A, 4R) and (B, A, C)."""

    pred_dist: Tensor
    pred_scores: Tensor
    targets: list[Tensor]
    levels: Levels
    reg_max: int
    assigner: TaskAligned

    def allocate(self) -> YOLO11Assignment:
        dist, dtype = self.pred_dist, wider(self.pred_dist, self.pred_scores)
        gt = new_ground_truth(self.targets, dtype)
        return YOLO11Assignment(
            of_anchors(dist, torch.int32), of_anchors(dist, dtype), dist.new_empty(2, dtype=dtype),
            dist.new_empty((), dtype=torch.int64), gt.labels, gt.boxes_xyxy,
        )  # fmt: skip


class YOLO11LossOutputs(NamedTuple):
    """The loss (); its weighted terms, () each; the normaliser for backward (2,), NaN where the loss is poisoned."""

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    held: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:4]


class YOLO11Loss(NamedTuple):
    """A given assignment. ``normaliser`` (2,) is what divides the terms, as it is, and what multiplies their sum."""

    pred_dist: Tensor
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

    def allocate(self) -> YOLO11LossOutputs:
        dtype = self.target_score.dtype
        return YOLO11LossOutputs(*(self.pred_dist.new_empty(shape, dtype=dtype) for shape in ((), (), (), (), 2)))


class GradDistScores(NamedTuple):
    grad_pred_dist: Tensor
    grad_pred_scores: Tensor


class YOLO11LossBackward(NamedTuple):
    grad: Tensor
    pred_dist: Tensor
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

    def allocate(self) -> GradDistScores:
        return GradDistScores(torch.empty_like(self.pred_dist), torch.empty_like(self.pred_scores))


class YOLO11Outputs(NamedTuple):
    """The loss (); its weighted terms, () each; number of positives; the row of every anchor; gradients.

    Rows and gradients that are not wanted have no elements.
    """

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    num_fg: Tensor
    target_row: Tensor
    grad_pred_dist: Tensor
    grad_pred_scores: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:4]


class YOLO11(NamedTuple):
    """The whole criterion of one process, and its gradients on the way."""

    pred_dist: Tensor
    pred_scores: Tensor
    targets: list[Tensor]
    class_weights: Tensor | None
    levels: Levels
    reg_max: int
    assigner: TaskAligned
    gains: tuple[float, ...]
    wants_grad: bool
    wants_row: bool

    def allocate(self) -> YOLO11Outputs:
        dist, scores = self.pred_dist, self.pred_scores
        loss = dist.new_empty((), dtype=working_dtype(dist.dtype))
        grads = (
            (torch.empty_like(dist), torch.empty_like(scores)) if self.wants_grad else (dist.new_empty(0), scores.new_empty(0))
        )
        num_fg = dist.new_empty((), dtype=torch.int64)
        row = dist.new_empty(dist.shape[:2] if self.wants_row else 0, dtype=torch.int32)
        terms = torch.empty_like(loss), torch.empty_like(loss), torch.empty_like(loss)
        return YOLO11Outputs(loss, *terms, num_fg, row, *grads)
