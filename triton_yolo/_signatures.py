"""Inputs and outputs of the operations: schema, fake, gradient and both backends follow from the fields of two NamedTuples.

``allocate`` of the inputs makes the outputs, empty; fakes and kernels share it. A gradient is an operation of its own. Its
inputs are ``grad``, that of the first output, and inputs and outputs of its operation by their names; ``backend`` says who ran
that. An output ``grad_x`` belongs to input ``x``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import working_dtype

BY_ROW = ("rows", "targets", "gt_labels", "gt_boxes")
"""Inputs with one entry a ground-truth row, of which every batch has another number."""

# ---- settings


class Levels(NamedTuple):
    """Levels of a feature pyramid: sizes (h0, w0, h1, w1, ...) in cells, and the stride of each in pixels."""

    feat_shapes: tuple[int, ...]
    strides: tuple[float, ...]

    @property
    def image_size(self) -> tuple[float, float]:
        """Height and width of the image in pixels."""
        return self.feat_shapes[0] * self.strides[0], self.feat_shapes[1] * self.strides[0]


class TaskAligned(NamedTuple):
    """Settings of the task-aligned assigner."""

    topk: int
    topk2: int | None
    alpha: float
    beta: float
    min_box_side: float
    eps: float


class SimOTA(NamedTuple):
    """Settings of SimOTA."""

    candidates: str
    radius: float


# ---- ground truth


class GroundTruth(NamedTuple):
    """Rows (N,) in any order: image index, negative for padding, and label, int64; box (N, 4) as corners and as centre and size.

    ``target_row`` (B, A) int32 of an assignment is the row of every anchor, or -1.
    """

    image_index: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    boxes_xywh: Tensor


class UnpackRows(NamedTuple):
    """Rows (N, 6) in the YOLO convention; the size of the image in pixels."""

    rows: Tensor
    width: float
    height: float

    def allocate(self) -> GroundTruth:
        return new_ground_truth([self.rows], working_dtype(self.rows.dtype))


def new_ground_truth(targets: list[Tensor], dtype: torch.dtype) -> GroundTruth:
    """Memory for what operations take as ``targets``: raw rows (N, 6), or the four fields of ``GroundTruth``."""
    boxes = targets[-1]
    num_rows = boxes.shape[0]  # len() would make a constant of it, and every number of rows a new compile
    integers = boxes.new_empty(num_rows, dtype=torch.int64)
    corners = boxes.new_empty((num_rows, 4), dtype=dtype)
    return GroundTruth(integers, torch.empty_like(integers), corners, torch.empty_like(corners))


# ---- stages


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
        return Boxes(_of_anchors(self.pred_dist, working_dtype(self.pred_dist.dtype), 4))


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
        return Boxes(_of_anchors(self.preds, working_dtype(self.preds.dtype), 4))


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


# ---- task-aligned assignment and YOLO11's loss


class TaskAlignedAssignment(NamedTuple):
    target_row: Tensor
    target_score: Tensor


class TaskAlignedAssign(NamedTuple):
    """Class probabilities (B, A, C) and boxes (B, A, 4) at arbitrary points (A, 2) in pixels."""

    scores: Tensor
    boxes: Tensor
    points: Tensor
    targets: list[Tensor]
    assigner: TaskAligned

    def allocate(self) -> TaskAlignedAssignment:
        return TaskAlignedAssignment(
            _of_anchors(self.scores, torch.int32), _of_anchors(self.scores, wider(self.scores, self.boxes))
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
            _of_anchors(dist, torch.int32), _of_anchors(dist, dtype), dist.new_empty(2, dtype=dtype),
            dist.new_empty((), dtype=torch.int64), gt.labels, gt.boxes_xyxy,
        )  # fmt: skip


class YOLO11LossOutputs(NamedTuple):
    """The loss (); its weighted terms (3,): box, cls, dfl; the normaliser for backward, NaN where the loss is poisoned."""

    loss: Tensor
    terms: Tensor
    held: Tensor


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
        return YOLO11LossOutputs(*(self.pred_dist.new_empty(shape, dtype=dtype) for shape in ((), 3, 2)))


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
    """The loss (); its weighted terms (3,): box, cls, dfl; number of positives; gradients, without elements if nobody wants them."""

    loss: Tensor
    terms: Tensor
    num_fg: Tensor
    grad_pred_dist: Tensor
    grad_pred_scores: Tensor


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

    def allocate(self) -> YOLO11Outputs:
        dist, scores = self.pred_dist, self.pred_scores
        loss = dist.new_empty((), dtype=working_dtype(dist.dtype))
        grads = (torch.empty_like(dist), torch.empty_like(scores)) if self.wants_grad else (dist.new_empty(0), scores.new_empty(0))
        return YOLO11Outputs(loss, loss.new_empty(3), dist.new_empty((), dtype=torch.int64), *grads)


# ---- SimOTA and YOLOX's loss


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
        return SimOTAAssignment(_of_anchors(self.cls_logits, torch.int32), _of_anchors(self.cls_logits, dtype))


class YOLOXAssignment(NamedTuple):
    """An assignment; counts (3,) int64 of positives, ground truths and predictions that poison the loss; rows' label and box.

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
            _of_anchors(preds, torch.int32), _of_anchors(preds, dtype), preds.new_empty(3, dtype=torch.int64),
            gt.labels, gt.boxes_xywh,
        )  # fmt: skip


class YOLOXLossOutputs(NamedTuple):
    """The loss (), and its weighted terms (4,): iou, obj, cls, l1."""

    loss: Tensor
    terms: Tensor


class YOLOXLoss(NamedTuple):
    """A given assignment. ``normaliser`` () divides the terms as it is; ``l1_gain`` () is 0 or 1, a tensor so that a compiled
    graph takes either."""

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
        return YOLOXLossOutputs(self.preds.new_empty((), dtype=dtype), self.preds.new_empty(4, dtype=dtype))


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
    """The loss (); its weighted terms (4,); positives per ground truth (); gradient, without elements if nobody wants it."""

    loss: Tensor
    terms: Tensor
    num_fg: Tensor
    grad_preds: Tensor


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
        return YOLOXOutputs(loss, loss.new_empty(4), loss.new_empty(()), grad)


def wider(*tensors: Tensor) -> torch.dtype:
    """The type that an operation on these computes in."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def _of_anchors(like: Tensor, dtype: torch.dtype, *channels: int) -> Tensor:
    return like.new_empty((*like.shape[:2], *channels), dtype=dtype)
