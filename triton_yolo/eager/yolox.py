"""YOLOX's assignment from raw predictions, and its loss."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import working
from ..targets import Targets
from .boxes import bbox_iou, bbox_iou_derivative, share
from .decode import decode_yolox, yolox_raw_grad
from .finite import is_finite
from .memory import blocks, row_parts, untouched_zeros_like
from .pairs import anchor_table, grid_pairs
from .simota import Regions, match


def yolox_assign(
    preds: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], candidates: str, radius: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    points, point_strides = anchor_table(feat_shapes, strides, preds)

    def find_near(centres: Tensor) -> tuple[Tensor, Tensor]:
        reach = 1.001 * radius * centres.new_tensor(strides)[:, None]
        return grid_pairs(centres[:, None] - reach, centres[:, None] + reach, feat_shapes, strides)

    def find_in_box(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return grid_pairs(low, high, feat_shapes, strides)

    def boxes_at(images: Tensor, anchors: Tensor) -> Tensor:
        return decode_yolox(preds[images, anchors, :4], points.T[anchors], point_strides[anchors])

    regions = Regions((points * point_strides).contiguous(), point_strides, candidates, radius, find_near, find_in_box)
    target_row, matched_iou, takes_part = match(
        preds[..., 5:], preds[..., 4], boxes_at, regions, image_index, labels, gt_boxes, gt_xywh
    )
    num_gt = Targets(image_index, labels, gt_boxes, gt_xywh).is_valid(len(preds), preds.shape[2] - 5).sum()
    is_whole = is_finite(preds[..., 4])
    images, anchors = takes_part.nonzero().unbind(-1)
    for part in row_parts(images, preds.shape[2]):
        is_whole = is_whole & is_finite(preds[images[part], anchors[part]])
    return target_row, matched_iou, torch.stack([(target_row >= 0).count_nonzero(), num_gt, (~is_whole).long()])


def yolox_loss(
    preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor, labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pos = _Positives(preds, target_row, matched_iou, labels, gt_xywh, feat_shapes, strides)
    overlap = bbox_iou(pos.boxes, pos.gt_boxes, iou_loss, 1e-16)
    overlap = overlap.where(~overlap.isnan(), 0 if iou_loss == "iou" else -1)  # of a finite prediction whose box overflows
    iou = (1 - overlap.square() if iou_loss == "iou" else 1 - overlap.clamp(-1, 1)).sum()
    obj_logits = working(preds[..., 4])
    obj = F.softplus(torch.where(target_row >= 0, -obj_logits, obj_logits), threshold=40).sum()
    cls = iou.new_zeros(())
    for part, images, anchors in pos.parts(preds.shape[2]):
        softplus = F.softplus(working(preds[images, anchors, 5:]), threshold=40).sum(1)
        cls += (softplus - pos.label_logits[part] * pos.ious[part]).sum()
    l1 = (pos.raw[:, :4] - pos.l1_targets).abs().sum().where(l1_gain > 0, 0)
    items = torch.stack([iou_gain * iou, obj, cls, l1]) / normaliser
    return items.sum(), items


def yolox_loss_backward(
    grad: Tensor, preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor,
    labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of the raw predictions, in their layout, for the gradient () of the loss."""
    if normaliser.isnan():
        return torch.full_like(preds, torch.nan)
    scale = grad / normaliser
    result = untouched_zeros_like(preds)
    for block in blocks(preds[..., 4:5]):
        result[..., 4][block] = working(preds[..., 4][block]).sigmoid().mul_(scale)

    pos = _Positives(preds, target_row, matched_iou, labels, gt_xywh, feat_shapes, strides)
    overlap = bbox_iou(pos.boxes, pos.gt_boxes, iou_loss, 1e-16)[:, None]
    slope = -2 * overlap if iou_loss == "iou" else -share(overlap.abs() < 1, overlap.abs() == 1)
    grad_boxes = iou_gain * slope * bbox_iou_derivative(pos.boxes, pos.gt_boxes, iou_loss, 1e-16)
    grad_raw = yolox_raw_grad(grad_boxes, pos.raw[:, 2:4], pos.strides)
    grad_raw = grad_raw.where(~grad_raw.isnan(), 0)  # of a finite prediction whose box overflows
    grad_raw += torch.sign(pos.raw[:, :4] - pos.l1_targets) * l1_gain
    grad_obj = pos.raw[:, 4:].sigmoid() - 1
    result[pos.images, pos.anchors, :5] = torch.cat([grad_raw, grad_obj], 1).mul_(scale).to(result.dtype)
    for part, images, anchors in pos.parts(preds.shape[2]):
        grad_cls = working(preds[images, anchors, 5:]).sigmoid()
        grad_cls[torch.arange(len(images), device=preds.device), pos.labels[part]] -= pos.ious[part]
        result[images, anchors, 5:] = grad_cls.mul_(scale).to(result.dtype)
    return result


class _Positives:
    """The positive anchors (M) with what both directions need of them, in pixels from the corner of their cell."""

    def __init__(
        self, preds: Tensor, target_row: Tensor, matched_iou: Tensor, labels: Tensor, gt_xywh: Tensor,
        feat_shapes: Sequence[int], strides: Sequence[float],
    ) -> None:  # fmt: skip
        points, point_strides = anchor_table(feat_shapes, strides, preds)
        self.images, self.anchors = (target_row >= 0).nonzero().unbind(-1)
        self.rows = target_row[self.images, self.anchors].long()
        self.labels, self.ious = labels[self.rows], matched_iou[self.images, self.anchors]
        self.raw = working(preds[self.images, self.anchors, :5])
        self.label_logits = working(preds[self.images, self.anchors, 5 + self.labels])
        corner, self.strides = points.T[self.anchors] - 0.5, point_strides[self.anchors][:, None]
        gt_xywh = gt_xywh.to(points.dtype)[self.rows]
        # Boxes from the corner of the cell: far from the origin float32 would round the overlap's derivative to 1e-5.
        centre, half = gt_xywh[:, :2] - corner * self.strides, gt_xywh[:, 2:] / 2
        self.gt_boxes = torch.cat([centre - half, centre + half], -1)
        self.boxes = decode_yolox(self.raw, torch.full_like(corner, 0.5), self.strides[:, 0])
        gt_cell = gt_xywh / self.strides
        self.l1_targets = torch.cat([gt_cell[:, :2] - corner, torch.log(gt_cell[:, 2:] + 1e-8)], -1)

    def parts(self, num_channels: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some positives at a time, few enough that their classes stay in the processor's cache; their images and anchors."""
        for part in row_parts(self.rows, num_channels):
            yield part, self.images[part], self.anchors[part]
