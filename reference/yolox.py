"""The YOLOX criterion (arXiv 2107.08430): IoU, objectness BCE, class BCE and, late in training, L1."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .anchors import make_anchors
from .boxes import bbox_iou, working_precision, xywh_to_xyxy
from .finite import poison
from .simota import SimOTAResult, decode_yolox, simota_assign
from .targets import pad_targets


class YOLOXLossOutput(NamedTuple):
    loss: Tensor
    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor
    num_fg: Tensor


def yolox_assign(
    preds: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    candidates: str = "center",
    center_radius: float = 1.5,
) -> SimOTAResult:
    """Assign the rows of ``targets`` (N, 6) to the anchors of the detached raw predictions (B, A, 5 + C)."""
    preds = working_precision(preds.detach())
    points, point_strides = make_anchors(feat_shapes, strides, dtype=preds.dtype, device=preds.device)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    labels, boxes, mask = pad_targets(targets.to(preds.dtype), preds.shape[0], imgsz)
    return simota_assign(
        preds[..., 5:], preds[..., 4], decode_yolox(preds, points, point_strides),
        points * point_strides[:, None], point_strides, labels, xywh_to_xyxy(boxes), mask,
        candidates=candidates, center_radius=center_radius, gt_centres=boxes[..., :2],
    )  # fmt: skip


def box_loss(pred: Tensor, target: Tensor, kind: str) -> Tensor:
    """1 - IoU^2, or 1 - GIoU, of boxes (M, 4) in pixels."""
    overlap = bbox_iou(pred, target, kind=kind, eps=1e-16)
    if kind == "iou":
        return 1 - overlap**2
    one = torch.ones_like(overlap)
    return 1 - torch.maximum(torch.minimum(overlap, one), -one)


def l1_targets(boxes_xywh: Tensor, points_cell: Tensor, strides: Tensor) -> Tensor:
    """What the raw box outputs (M, 4) of these anchors should be."""
    strides = strides[:, None]
    return torch.cat([boxes_xywh[:, :2] / strides - (points_cell - 0.5), torch.log(boxes_xywh[:, 2:] / strides + 1e-8)], -1)


def yolox_loss(
    preds: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    iou_loss: str = "iou",
    iou_gain: float = 5.0,
    use_l1: bool = False,
    assignment: SimOTAResult | None = None,
    candidates: str = "center",
    center_radius: float = 1.5,
) -> YOLOXLossOutput:
    """The whole criterion; ``assignment`` replaces the assigner's result if given."""
    regions = {"candidates": candidates, "center_radius": center_radius}
    if assignment is None:
        assignment = yolox_assign(preds, feat_shapes, targets, strides=strides, **regions)
    raw = working_precision(preds)
    points, point_strides = make_anchors(feat_shapes, strides, dtype=raw.dtype, device=raw.device)
    imgsz = (feat_shapes[0][0] * strides[0], feat_shapes[0][1] * strides[0])
    labels, boxes, mask = pad_targets(targets.to(raw.dtype), raw.shape[0], imgsz)
    fg = assignment.fg_mask
    normaliser = fg.sum().clamp(min=1)
    obj = F.binary_cross_entropy_with_logits(raw[..., 4], fg.to(raw.dtype), reduction="sum") / normaliser

    image, anchor = fg.nonzero(as_tuple=True)
    slot = assignment.target_gt_idx[fg]
    gt_xywh, gt_label = boxes[image, slot], labels[image, slot]
    pred = decode_yolox(raw[fg], points[anchor], point_strides[anchor])
    # The size of a finite prediction may overflow: such a box overlaps nothing, and no small step changes that.
    is_bounded = pred.isfinite().all(-1)
    pred = decode_yolox(raw[fg][is_bounded], points[anchor][is_bounded], point_strides[anchor][is_bounded])
    unbounded_loss = (~is_bounded).sum() * (1 if iou_loss == "iou" else 2)
    iou = (box_loss(pred, xywh_to_xyxy(gt_xywh)[is_bounded], iou_loss).sum() + unbounded_loss) / normaliser
    cls_target = F.one_hot(gt_label, raw.shape[-1] - 5) * assignment.matched_iou[fg][:, None]
    cls = F.binary_cross_entropy_with_logits(raw[fg][:, 5:], cls_target.to(raw.dtype), reduction="sum") / normaliser
    if use_l1:
        l1 = (raw[fg][:, :4] - l1_targets(gt_xywh, points[anchor], point_strides[anchor])).abs().sum() / normaliser
    else:
        l1 = raw.new_zeros(())

    # What takes part in the loss and is not finite shows, even where no formula reads it.
    not_finite = poison(raw[..., 4].isfinite().all() & raw[fg].isfinite().all(), raw)
    iou, obj, cls, l1 = iou_gain * iou + not_finite, obj + not_finite, cls + not_finite, l1 + not_finite
    positives_per_box = fg.sum().to(raw.dtype) / mask.sum().clamp(min=1)
    return YOLOXLossOutput(iou + obj + cls + l1, iou.detach(), obj.detach(), cls.detach(), l1.detach(), positives_per_box)
