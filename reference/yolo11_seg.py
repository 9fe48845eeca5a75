"""The YOLO11-seg criterion: that of the detector, and the masks of its positives."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .boxes import working_precision, xywh_to_xyxy
from .finite import poison
from .masks import MaskTargets, mask_loss
from .targets import is_xywh_box
from .task_aligned import TaskAlignedResult
from .yolo11 import yolo11_assign, yolo11_loss


class YOLO11SegLossOutput(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    mask: Tensor
    num_fg: Tensor


def rows_of_anchors(assignment: TaskAlignedResult, image_index: Tensor, is_target: Tensor) -> Tensor:
    """The row (B, A) of ``image_index`` (N,) that every anchor is matched with, -1 for none: slots are rows that count."""
    result = torch.full_like(assignment.target_gt_idx, -1)
    for image, (slot, is_fg) in enumerate(zip(assignment.target_gt_idx, assignment.fg_mask, strict=True)):
        rows = ((image_index == image) & is_target).nonzero().squeeze(1)
        result[image, is_fg] = rows[slot[is_fg]]
    return result


def yolo11_seg_loss(
    pred_dist: Tensor,
    pred_scores: Tensor,
    pred_masks: Tensor,
    prototypes: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    masks: Tensor,
    *,
    overlap_mask: bool = True,
    mask_gain: float = 7.5,
    strides: Sequence[float] = (8, 16, 32),
    reg_max: int = 16,
    class_weights: Tensor | None = None,
    **assigner_options: Any,
) -> YOLO11SegLossOutput:
    """The whole criterion of rows (N, 6) and their masks, see ``MaskTargets``."""
    levels: dict[str, Any] = {"feat_shapes": feat_shapes, "targets": targets, "strides": strides, "reg_max": reg_max}
    assignment = yolo11_assign(pred_dist, pred_scores, **levels, **assigner_options)
    found = yolo11_loss(pred_dist, pred_scores, **levels, class_weights=class_weights, assignment=assignment)
    height, width = feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0]
    rows = targets.to(found.loss.dtype)
    boxes = rows[:, 2:] * rows.new_tensor([width, height, width, height])
    row = rows_of_anchors(assignment, rows[:, 0], is_xywh_box(boxes))
    truth = MaskTargets(rows[:, 0].long(), xywh_to_xyxy(boxes), masks, overlap_mask)
    mask = mask_gain * mask_loss(pred_masks, prototypes, row, truth, imgsz=(height, width))
    preds = [working_precision(x) for x in (pred_dist, pred_scores, pred_masks, prototypes)]
    not_finite = poison(~(found.loss.isnan() | mask.isnan()), *preds)
    terms = [term.detach() + not_finite.detach() for term in (found.box, found.cls, found.dfl, mask)]
    return YOLO11SegLossOutput(found.loss + len(pred_dist) * mask + not_finite, *terms, found.num_fg)
