"""Stages of both systems."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .common import of_anchors, wider


class Boxes(NamedTuple):
    """(B, A, 4) in xyxy."""

    boxes: Tensor


class DecodeDFL(NamedTuple):
    """Logits (B, A, 4R); points (A, 2) in cells; strides (A,) if boxes are to be in pixels."""

    pred_dist: Tensor
    anchor_points: Tensor
    strides: Tensor | None
    reg_max: int

    def allocate(self) -> Boxes:
        return Boxes(of_anchors(self.pred_dist, working_dtype(self.pred_dist.dtype), 4))


class GradDist(NamedTuple):
    grad_pred_dist: Tensor


class DecodeDFLBackward(NamedTuple):
    grad: Tensor
    pred_dist: Tensor
    strides: Tensor | None
    reg_max: int
    backend: str

    def allocate(self) -> GradDist:
        return GradDist(torch.empty_like(self.pred_dist))


class DecodeYOLOX(NamedTuple):
    """Raw predictions (B, A, 4 or more); points (A, 2) in cells; strides (A,)."""

    preds: Tensor
    anchor_points: Tensor
    strides: Tensor

    def allocate(self) -> Boxes:
        return Boxes(of_anchors(self.preds, working_dtype(self.preds.dtype), 4))


class GradPreds(NamedTuple):
    grad_preds: Tensor


class DecodeYOLOXBackward(NamedTuple):
    grad: Tensor
    preds: Tensor
    strides: Tensor
    backend: str

    def allocate(self) -> GradPreds:
        return GradPreds(torch.empty_like(self.preds))


class Overlaps(NamedTuple):
    overlaps: Tensor


class BboxIoU(NamedTuple):
    """Boxes (..., 4) of one shape."""

    a: Tensor
    b: Tensor
    kind: str
    eps: float

    def allocate(self) -> Overlaps:
        return Overlaps(self.a.new_empty(self.a.shape[:-1], dtype=wider(self.a, self.b)))


class GradBoxes(NamedTuple):
    grad_a: Tensor
    grad_b: Tensor


class BboxIoUBackward(NamedTuple):
    grad: Tensor
    a: Tensor
    b: Tensor
    kind: str
    eps: float
    backend: str

    def allocate(self) -> GradBoxes:
        return GradBoxes(self.a.new_empty(self.a.shape), self.b.new_empty(self.b.shape))


class ProbIoU(NamedTuple):
    """Oriented boxes (..., 5) of one shape."""

    a: Tensor
    b: Tensor
    eps: float
    floor: float

    def allocate(self) -> Overlaps:
        return Overlaps(self.a.new_empty(self.a.shape[:-1], dtype=wider(self.a, self.b)))


class ProbIoUBackward(NamedTuple):
    grad: Tensor
    a: Tensor
    b: Tensor
    eps: float
    floor: float
    backend: str

    def allocate(self) -> GradBoxes:
        return GradBoxes(self.a.new_empty(self.a.shape), self.b.new_empty(self.b.shape))


class Metrics(NamedTuple):
    """Both (B, G, A)."""

    metric: Tensor
    overlaps: Tensor


class AlignMetric(NamedTuple):
    """Class probabilities (B, A, C) and boxes (B, A, 4) at points (A, 2) in pixels; ``num_slots`` rows an image, in order."""

    scores: Tensor
    boxes: Tensor
    points: Tensor
    targets: list[Tensor]
    num_slots: int
    alpha: float
    beta: float
    min_box_side: float

    def allocate(self) -> Metrics:
        (batch_size, num_anchors, _), dtype = self.scores.shape, wider(self.scores, self.boxes)
        shape = (batch_size, self.num_slots, num_anchors)
        return Metrics(self.scores.new_empty(shape, dtype=dtype), self.scores.new_empty(shape, dtype=dtype))


class Selected(NamedTuple):
    """(B, G, A) bool."""

    selected: Tensor


class SelectTopk(NamedTuple):
    metric: Tensor
    topk: int
    mask_gt: Tensor | None

    def allocate(self) -> Selected:
        return Selected(self.metric.new_empty(self.metric.shape, dtype=torch.bool))
