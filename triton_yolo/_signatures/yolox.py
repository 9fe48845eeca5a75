"""SimOTA, and YOLOX's criterion: whole, and in two parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .common import Levels, SimOTA, new_ground_truth, of_anchors, wider
from .stages import GradPreds


class SimOTAAssignment(NamedTuple):
    target_row: Tensor
    matched_iou: Tensor


class SimOTAAssign(NamedTuple):
    """Logits (B, A, C) and (B, A), boxes (B, A, 4) at points (A, 2) with strides (A,), in pixels."""

    cls_logits: Tensor
    obj_logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    targets: list[Tensor]
    assigner: SimOTA

    def allocate(self) -> SimOTAAssignment:
        dtype = wider(self.cls_logits, self.obj_logits, self.boxes)
        return SimOTAAssignment(of_anchors(self.cls_logits, torch.int32), of_anchors(self.cls_logits, dtype))


class YOLOXAssignment(NamedTuple):
    """An assignment; counts (3,) int64 of positives, ground truths, and 1 if predictions poison the loss; rows' label and box.

    ``gt_boxes`` are centre and size.
    """

    target_row: Tensor
    matched_iou: Tensor
    counts: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor


class YOLOXAssign(NamedTuple):
    """Raw predictions (B, A, 5 + C)."""

    preds: Tensor
    targets: list[Tensor]
    levels: Levels
    assigner: SimOTA

    def allocate(self) -> YOLOXAssignment:
        preds, dtype = self.preds, working_dtype(self.preds.dtype)
        gt = new_ground_truth(self.targets, dtype)
        return YOLOXAssignment(
            of_anchors(preds, torch.int32), of_anchors(preds, dtype), preds.new_empty(3, dtype=torch.int64),
            gt.labels, gt.boxes_xywh,
        )  # fmt: skip


class YOLOXLossOutputs(NamedTuple):
    """The loss (), and its weighted terms, () each."""

    loss: Tensor
    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:5]


class YOLOXLoss(NamedTuple):
    """A given assignment. ``normaliser`` () divides the terms as it is; ``l1_gain`` () is 0 or 1, a tensor so that a compiled
    graph takes either.
    """

    preds: Tensor
    target_row: Tensor
    matched_iou: Tensor
    normaliser: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor
    l1_gain: Tensor
    levels: Levels
    iou_loss: str
    iou_gain: float

    def allocate(self) -> YOLOXLossOutputs:
        dtype = self.matched_iou.dtype
        return YOLOXLossOutputs(*(self.preds.new_empty((), dtype=dtype) for _ in range(5)))


class YOLOXLossBackward(NamedTuple):
    grad: Tensor
    preds: Tensor
    target_row: Tensor
    matched_iou: Tensor
    normaliser: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor
    l1_gain: Tensor
    levels: Levels
    iou_loss: str
    iou_gain: float
    backend: str

    def allocate(self) -> GradPreds:
        return GradPreds(torch.empty_like(self.preds))


class YOLOXOutputs(NamedTuple):
    """The loss (); its weighted terms, () each; positives per ground truth (); gradient, without elements if unwanted."""

    loss: Tensor
    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor
    num_fg: Tensor
    grad_preds: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:5]


class YOLOX(NamedTuple):
    """The whole criterion of one process, and its gradient on the way."""

    preds: Tensor
    targets: list[Tensor]
    l1_gain: Tensor
    levels: Levels
    assigner: SimOTA
    iou_loss: str
    iou_gain: float
    wants_grad: bool

    def allocate(self) -> YOLOXOutputs:
        preds = self.preds
        loss = preds.new_empty((), dtype=working_dtype(preds.dtype))
        grad = torch.empty_like(preds) if self.wants_grad else preds.new_empty(0)
        others = [torch.empty_like(loss) for _ in range(5)]  # takes less time than ``new_empty``
        return YOLOXOutputs._make((loss, *others, grad))
