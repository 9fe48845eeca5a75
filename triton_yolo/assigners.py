"""Label assignment for padded ground truth, in the shapes that the field uses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, _ops
from ._precision import widened
from ._signatures import SimOTA, SimOTAAssign, TaskAligned, TaskAlignedAssign
from .stages import padded_targets

CANDIDATE_MODES = ("center", "box_and_center")


class TaskAlignedResult(NamedTuple):
    """What ``TaskAlignedAssigner`` returns. A background anchor has label C, box 0, scores 0, slot 0.

    Attributes:
        target_labels: (B, A) int64.
        target_bboxes: (B, A, 4) xyxy in pixels.
        target_scores: (B, A, C), the target score at the class of the ground truth, 0 elsewhere.
        fg_mask: (B, A) bool, true for positive anchors.
        target_gt_idx: (B, A) int64, slot of the ground truth in its image.
    """

    target_labels: Tensor
    target_bboxes: Tensor
    target_scores: Tensor
    fg_mask: Tensor
    target_gt_idx: Tensor


class SimOTAResult(NamedTuple):
    """What ``SimOTAAssigner`` returns. A background anchor has slot 0 and IoU 0.

    Attributes:
        fg_mask: (B, A) bool, true for positive anchors.
        target_gt_idx: (B, A) int64, slot of the ground truth in its image.
        matched_iou: (B, A), IoU of the predicted box with that ground truth.
        num_fg: () int64, number of positive anchors in the batch.
    """

    fg_mask: Tensor
    target_gt_idx: Tensor
    matched_iou: Tensor
    num_fg: Tensor


class TaskAlignedAssigner(nn.Module):
    """Task-aligned assignment of ground truths to anchors (TOOD, arXiv 2108.07755).

    Every ground truth claims its ``topk`` candidates of the highest metric score^alpha * CIoU^beta. An anchor claimed by
    several goes to the ground truth of its image with the highest overlap, also one that did not claim it. Exact: a metric of
    0 is never claimed, equal metrics go to the lower anchor index, equal overlaps to the lower slot.

    Args:
        topk: candidates a ground truth claims; may exceed the number of anchors.
        num_classes: number of classes C.
        alpha: exponent of the score.
        beta: exponent of the overlap.
        eps: margin of the candidate test in pixels and guard of the target scores' division.
        topk2: if given, a ground truth keeps only so many of its highest metrics after the conflicts.
        min_box_side: sides shorter than this are widened to it for the candidate test, in pixels.

    Raises:
        ValueError: ``topk``, ``topk2`` or ``num_classes`` is below 1.

    Example:
        >>> points, strides = ty.make_anchors([(4, 4)], (8,))
        >>> points = points * strides[:, None]
        >>> pd_scores, pd_bboxes = torch.full((1, 16, 3), 0.5), torch.cat([points - 8, points + 8], 1)[None]
        >>> gt_labels, gt_bboxes, mask_gt = torch.tensor([[2]]), torch.tensor([[[2.0, 2, 22, 14]]]), torch.ones(1, 1)
        >>> assigner = ty.TaskAlignedAssigner(topk=2, num_classes=3)
        >>> assigned = assigner(pd_scores, pd_bboxes, points, gt_labels, gt_bboxes, mask_gt)
        >>> assigned.fg_mask.nonzero().tolist()  # image, anchor
        [[0, 1], [0, 5]]
    """

    _box_size = 4

    def __init__(
        self,
        topk: int = 13,
        num_classes: int = 80,
        alpha: float = 1.0,
        beta: float = 6.0,
        eps: float = 1e-9,
        topk2: int | None = None,
        min_box_side: float = 0.0,
    ) -> None:
        super().__init__()
        self.topk = _checks.whole("topk", topk)
        self.topk2 = None if topk2 is None else _checks.whole("topk2", topk2)
        self.num_classes = _checks.whole("num_classes", num_classes)
        self.alpha, self.beta = _checks.real("alpha", alpha), _checks.real("beta", beta)
        self.eps, self.min_box_side = _checks.real("eps", eps), _checks.real("min_box_side", min_box_side)

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> TaskAlignedResult:
        """Assign. The result has no gradient.

        Args:
            pd_scores: (B, A, C) class probabilities.
            pd_bboxes: (B, A, 4) xyxy in pixels.
            anc_points: (A, 2) in pixels, any points.
            gt_labels: (B, G) or (B, G, 1) classes.
            gt_bboxes: (B, G, 4) xyxy in pixels.
            mask_gt: (B, G) or (B, G, 1), true where there is a box.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for a label out of range (elsewhere it is ignored).
            TypeError: an argument that must be a float tensor is not.
        """
        names = ("pd_scores", "pd_bboxes", "anc_points")
        targets, labels = padded_targets(pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, names, self._box_size)
        _checks.tensor("pd_scores", pd_scores, ("B", "A", self.num_classes))
        pd_scores, pd_bboxes, anc_points, gt_bboxes = widened(pd_scores, pd_bboxes, anc_points, gt_bboxes)
        rule = TaskAligned(self.topk, self.topk2, self.alpha, self.beta, self.min_box_side, self.eps)
        x = TaskAlignedAssign(pd_scores, pd_bboxes, anc_points, targets, rule)
        target_row, target_score = _ops.task_aligned_assign(x)
        fg_mask, slot = slots_of_rows(target_row, labels.shape[1])
        if labels.shape[1] == 0:
            target_labels = torch.full_like(slot, self.num_classes)
            target_bboxes = gt_bboxes.new_zeros(*slot.shape, self._box_size)
        else:
            target_labels = labels.gather(1, slot).where(fg_mask, self.num_classes)
            index = slot.unsqueeze(-1).expand(-1, -1, self._box_size)
            target_bboxes = gt_bboxes.gather(1, index).where(fg_mask.unsqueeze(-1), 0)
        classes = torch.arange(self.num_classes, device=slot.device)
        target_scores = target_score.unsqueeze(-1).where(target_labels.unsqueeze(-1) == classes, 0)
        return TaskAlignedResult(target_labels, target_bboxes, target_scores, fg_mask, slot)


class RotatedTaskAlignedAssigner(TaskAlignedAssigner):
    """Task-aligned assignment of oriented boxes, by ProbIoU (arXiv 2106.06072) in place of CIoU.

    Boxes given and found are (B, ..., 5): centre x, centre y, width and height in pixels, angle in radians from x towards y. A
    ground truth with a side that is not positive, or a number that is not finite, is ignored.

    An anchor is a candidate of a ground truth if its point lies in the rotated rectangle or on an edge. The rest is as in
    ``TaskAlignedAssigner``, arguments and ties too; ``eps`` guards the division only, and ``min_box_side`` is along the axes of
    the box. Ultralytics' assigner of this name has 16 there.

    Example:
        >>> points, strides = ty.make_anchors([(4, 4)], (8,))
        >>> points = points * strides[:, None]
        >>> pd_bboxes = torch.cat([points, torch.tensor([[20.0, 6, 0.8]]).expand(16, 3)], 1)[None]
        >>> gt_labels, gt_bboxes, mask_gt = torch.tensor([[2]]), torch.tensor([[[8.0, 8, 24, 8, 0.8]]]), torch.ones(1, 1)
        >>> assigner = ty.RotatedTaskAlignedAssigner(num_classes=3)
        >>> assigned = assigner(torch.full((1, 16, 3), 0.5), pd_bboxes, points, gt_labels, gt_bboxes, mask_gt)
        >>> assigned.fg_mask.nonzero().tolist()  # image, anchor
        [[0, 0], [0, 5]]
    """

    _box_size = 5


class SimOTAAssigner(nn.Module):
    """Simplified optimal-transport assignment (YOLOX, arXiv 2107.08430, section 2.1; OTA, arXiv 2103.14259).

    Every ground truth takes its k cheapest anchors of those that take part in its image, k being the sum of its 10 largest
    IoUs, at least 1. An anchor taken by several goes to the cheapest of all. Exact: equal costs go to the lower anchor index,
    in a conflict to the lower slot.

    Args:
        num_classes: number of classes C.
        center_radius: half the side of the centre region, in strides.
        candidates: ``"center"``: an anchor takes part if it is in the centre region of any box, and a pair is feasible if it
            is in that of its own box. ``"box_and_center"`` (the paper, radius 2.5): it takes part if it is in any box or
            centre region, and a pair is feasible if it is in both of its own box.

    Raises:
        ValueError: ``candidates`` is unknown, ``num_classes`` is below 1 or ``center_radius`` is not positive.

    Example:
        >>> points, strides = ty.make_anchors([(4, 4)], (8,))
        >>> points = points * strides[:, None]
        >>> logits, boxes = torch.zeros(1, 16, 3), torch.cat([points - 8, points + 8], 1)[None]
        >>> gt_labels, gt_bboxes, mask_gt = torch.tensor([[2]]), torch.tensor([[[2.0, 2, 22, 14]]]), torch.ones(1, 1)
        >>> assigner = ty.SimOTAAssigner(num_classes=3)
        >>> assigned = assigner(logits, logits[..., 0], boxes, points, strides, gt_labels, gt_bboxes, mask_gt)
        >>> assigned.fg_mask.nonzero().tolist()  # image, anchor
        [[0, 1]]
    """

    def __init__(self, num_classes: int = 80, center_radius: float = 1.5, candidates: str = "center") -> None:
        super().__init__()
        self.num_classes = _checks.whole("num_classes", num_classes)
        self.center_radius = _checks.real("center_radius", center_radius, is_positive=True)
        self.candidates = _checks.one_of("candidates", candidates, CANDIDATE_MODES)

    @torch.no_grad()
    def forward(
        self,
        cls_logits: Tensor,
        obj_logits: Tensor,
        pred_bboxes: Tensor,
        anc_points: Tensor,
        strides: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> SimOTAResult:
        """Assign. The result has no gradient.

        Args:
            cls_logits: (B, A, C).
            obj_logits: (B, A) or (B, A, 1).
            pred_bboxes: (B, A, 4) xyxy in pixels.
            anc_points: (A, 2) centres of the cells, in pixels.
            strides: (A,) in pixels.
            gt_labels: (B, G) or (B, G, 1) classes.
            gt_bboxes: (B, G, 4) xyxy in pixels.
            mask_gt: (B, G) or (B, G, 1), true where there is a box.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for a label out of range (elsewhere it is ignored).
            TypeError: an argument that must be a float tensor is not.
        """
        names = ("cls_logits", "pred_bboxes", "anc_points")
        targets, labels = padded_targets(cls_logits, pred_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, names)
        _checks.tensor("cls_logits", cls_logits, ("B", "A", self.num_classes))
        obj_logits = _checks.per_slot("obj_logits", obj_logits, cls_logits)
        _checks.tensor("obj_logits", obj_logits, ("B", "A"))
        _checks.tensor("strides", strides, (cls_logits.shape[1],), like=cls_logits)
        cls_logits, obj_logits, pred_bboxes, anc_points, strides, _ = widened(
            cls_logits, obj_logits, pred_bboxes, anc_points, strides, gt_bboxes
        )
        rule = SimOTA(self.candidates, self.center_radius)
        x = SimOTAAssign(cls_logits, obj_logits, pred_bboxes, anc_points, strides, targets, rule)
        target_row, matched_iou = _ops.simota_assign(x)
        fg_mask, slot = slots_of_rows(target_row, labels.shape[1])
        return SimOTAResult(fg_mask, slot, matched_iou, fg_mask.sum())


def slots_of_rows(target_row: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Positive mask (B, A), and slot (B, A) of the row in its image, 0 for background."""
    first_row = num_slots * torch.arange(target_row.shape[0], device=target_row.device).unsqueeze(1)
    fg_mask = target_row >= 0
    return fg_mask, (target_row - first_row).where(fg_mask, 0)
