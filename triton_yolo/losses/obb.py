"""The criterion of YOLO11 and its kin for oriented boxes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .. import _ops
from ..targets import Targets
from ._task_aligned import TaskAlignedCriterion


class YOLO11OBBLossOutput(NamedTuple):
    """What ``YOLO11OBBLoss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), B * (box + cls + dfl + angle).
        box: (), ProbIoU term with its gain.
        cls: (), classification term with its gain.
        dfl: (), distribution focal term (L1 with ``reg_max=1``) with its gain.
        angle: (), term on the angles with its gain.
        num_fg: () int64, number of positive anchors on this process.
    """

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    angle: Tensor
    num_fg: Tensor


class YOLO11OBBLoss(TaskAlignedCriterion):
    """The criterion of oriented boxes of YOLO11, YOLOv8 and 26: task-aligned assignment, BCE, ProbIoU, DFL and the angle.

    ProbIoU: arXiv 2106.06072. ``docs/oriented-boxes.md`` has the rules. Ground truths with a side below 2 px are ignored. The
    rest is as of ``YOLO11Loss``: types, numbers that are not finite, ties.

    Args:
        num_classes: number of classes C.
        strides: stride of every level in pixels, in the order in which the predictions are concatenated.
        reg_max: bins of the distance distribution R; 1 means plain distances and an L1 term instead of DFL.
        topk: candidates a ground truth claims.
        topk2: if given, a ground truth keeps only so many of them after the conflicts (one-to-one heads: 1).
        alpha: exponent of the score in the alignment metric.
        beta: exponent of the overlap.
        box_gain: weight of the ProbIoU term.
        cls_gain: weight of the classification term.
        dfl_gain: weight of the DFL term.
        angle_gain: weight of the term on the angles.
        min_box_side: sides shorter than this count as this long when candidates are sought, in pixels.
        class_weights: see ``YOLO11Loss``.
        process_group: see ``YOLO11Loss``.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> criterion = ty.YOLO11OBBLoss(num_classes=3, strides=(8,), reg_max=16)
        >>> preds = [torch.zeros(2, 16, channels, requires_grad=True) for channels in (64, 1, 3)]
        >>> targets = torch.tensor([[0, 2, 0.5, 0.5, 0.6, 0.4, 0.8]])  # image, class, cx, cy, w, h, angle
        >>> out = criterion(*preds, [(4, 4)], targets)
        >>> out.loss.backward()
        >>> out.num_fg
        tensor(4)
    """

    _whole, _assign, _loss = _ops.yolo11_obb_criterion, _ops.yolo11_obb_assign, _ops.yolo11_obb_loss
    _box_size = 5

    def __init__(
        self,
        num_classes: int,
        *,
        strides: Sequence[float] = (8, 16, 32),
        reg_max: int = 16,
        topk: int = 10,
        topk2: int | None = None,
        alpha: float = 0.5,
        beta: float = 6.0,
        box_gain: float = 7.5,
        cls_gain: float = 0.5,
        dfl_gain: float = 1.5,
        angle_gain: float = 1.0,
        min_box_side: float = 0.0,
        class_weights: Tensor | None = None,
        process_group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__(
            num_classes, strides, reg_max, topk, topk2, alpha, beta, min_box_side, class_weights, process_group,
            box_gain=box_gain, cls_gain=cls_gain, dfl_gain=dfl_gain, angle_gain=angle_gain,
        )  # fmt: skip

    def forward(
        self,
        pred_dist: Tensor,
        pred_angle: Tensor,
        pred_scores: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Tensor | Targets,
    ) -> YOLO11OBBLossOutput:
        """Assign the targets and compute the loss.

        Args:
            pred_dist: (B, A, 4 * reg_max) logits of the distances along the box's axes. Any strides: pass channel-first as
                ``x.transpose(1, 2)``.
            pred_angle: (B, A, 1) in radians from the x axis towards y, any strides.
            pred_scores: (B, A, C) class logits, any strides.
            feat_shapes: (height, width) of every level in cells.
            targets: (N, 7) rows of (image index, class, cx, cy, w, h, angle), centre and sides normalised to 0-1 of the image,
                whose size is that of the first level times its stride; or ``Targets`` with angles, in pixels.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for an image index or a label out of range (elsewhere
                such a row is ignored).
            TypeError: predictions or rows are not float tensors.
        """
        preds = {"pred_dist": pred_dist, "pred_angle": pred_angle, "pred_scores": pred_scores}
        loss, terms, num_fg, _ = self._compute(*self._checked(preds, feat_shapes), targets)
        box, cls, dfl, angle = terms
        return YOLO11OBBLossOutput(loss, box, cls, dfl, angle, num_fg)

    def loss_of(
        self,
        pred_dist: Tensor,
        pred_angle: Tensor,
        pred_scores: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Targets,
        target_row: Tensor,
        target_score: Tensor,
        normaliser: Tensor,
    ) -> YOLO11OBBLossOutput:
        """Compute the loss of an assignment that another assigner made, as ``YOLO11Loss.loss_of``.

        Args:
            pred_dist: (B, A, 4 * reg_max), see ``forward``.
            pred_angle: (B, A, 1), see ``forward``.
            pred_scores: (B, A, C), see ``forward``.
            feat_shapes: (height, width) of every level in cells.
            targets: ground truth in pixels, with angles.
            target_row: (B, A) int32 or int64, the row of ``targets`` that every anchor is matched with, -1 for background.
                The row is one of the anchor's image.
            target_score: (B, A), target of the matched class, which also weights the other terms; not read at background.
            normaliser: () number that the terms are divided by, as it is.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for a row that there is not, or that has another image or
                no class (elsewhere its anchor is background).
            TypeError: a type is wrong.
        """
        preds = {"pred_dist": pred_dist, "pred_angle": pred_angle, "pred_scores": pred_scores}
        loss, terms, num_fg, _ = self._compute_of(preds, feat_shapes, targets, target_row, target_score, normaliser)
        box, cls, dfl, angle = terms
        return YOLO11OBBLossOutput(loss, box, cls, dfl, angle, num_fg)
