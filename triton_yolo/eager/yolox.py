"""YOLOX's assignment from raw predictions, and its loss."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import working
from .._rows import is_valid
from .._signatures import (
    YOLOX,
    GradPreds,
    YOLOXAssign,
    YOLOXAssignment,
    YOLOXLoss,
    YOLOXLossBackward,
    YOLOXLossOutputs,
    YOLOXOutputs,
)
from .boxes import overlap, overlap_derivative, share
from .decode import boxes_from_raw, yolox_raw_grad
from .finite import is_finite
from .memory import blocks, row_parts, untouched_zeros_like
from .pairs import anchor_table, grid_pairs
from .simota import Regions, match
from .targets import ground_truth


def yolox_assign(x: YOLOXAssign) -> YOLOXAssignment:
    preds, levels = x.preds, x.levels
    points, point_strides = anchor_table(levels, preds)
    gt = ground_truth(x.targets, levels, points.dtype)

    def find_near(centres: Tensor) -> tuple[Tensor, Tensor]:
        reach = 1.001 * x.assigner.radius * centres.new_tensor(levels.strides)[:, None]
        return grid_pairs(centres[:, None] - reach, centres[:, None] + reach, levels)

    def find_in_box(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return grid_pairs(low, high, levels)

    def boxes_at(images: Tensor, anchors: Tensor) -> Tensor:
        return boxes_from_raw(preds[images, anchors, :4], points.T[anchors], point_strides[anchors])

    regions = Regions((points * point_strides).contiguous(), point_strides, *x.assigner, find_near, find_in_box)
    target_row, matched_iou = match(preds[..., 5:], preds[..., 4], boxes_at, regions, gt)
    num_gt = is_valid(*gt, len(preds), preds.shape[2] - 5).sum()
    is_whole = is_finite(preds[..., 4])
    images, anchors = (target_row >= 0).nonzero().unbind(-1)
    for part in row_parts(images, preds.shape[2]):
        is_whole = is_whole & is_finite(preds[images[part], anchors[part]])
    counts = torch.stack([num_gt.new_tensor(len(images)), num_gt, (~is_whole).long()])
    return YOLOXAssignment(target_row, matched_iou, counts, gt.labels.clone(), gt.boxes_xywh.clone())


def yolox_criterion(x: YOLOX) -> YOLOXOutputs:
    row, iou, counts, labels, boxes = yolox_assign(YOLOXAssign(x.preds, x.targets, x.levels, x.assigner))
    num_fg, num_gt, is_broken = counts.to(iou.dtype).unbind()
    normaliser = num_fg.clamp(min=1).masked_fill(is_broken > 0, torch.nan)
    given = YOLOXLoss(x.preds, row, iou, normaliser, labels, boxes, x.l1_gain, x.levels, x.iou_loss, x.iou_gain)
    pos = _Positives(given)
    loss, *terms = _loss(given, pos)
    num_fg = num_fg / num_gt.clamp(min=1)
    if not x.wants_grad:
        return YOLOXOutputs._make((loss, *terms, num_fg, x.preds.new_empty(0)))
    return YOLOXOutputs._make((loss, *terms, num_fg, *_gradient(given, pos, 1 / normaliser)))


def yolox_loss(x: YOLOXLoss) -> YOLOXLossOutputs:
    return _loss(x, _Positives(x))


def yolox_loss_backward(x: YOLOXLossBackward) -> GradPreds:
    return _gradient(x, _Positives(x), x.grad / x.normaliser)


def _loss(x: YOLOXLoss, pos: "_Positives") -> YOLOXLossOutputs:
    preds, is_iou = x.preds, x.iou_loss == "iou"
    overlaps = overlap(pos.boxes, pos.gt_boxes, x.iou_loss, 1e-16)
    overlaps = overlaps.where(~overlaps.isnan(), 0 if is_iou else -1)  # of a finite prediction whose box overflows
    iou = (1 - overlaps.square() if is_iou else 1 - overlaps.clamp(-1, 1)).sum()
    obj_logits = working(preds[..., 4])
    obj = F.softplus(torch.where(x.target_row >= 0, -obj_logits, obj_logits), threshold=40).sum()
    cls = iou.new_zeros(())
    for part, images, anchors in pos.parts(preds.shape[2]):
        softplus = F.softplus(working(preds[images, anchors, 5:]), threshold=40).sum(1)
        cls += (softplus - pos.label_logits[part] * pos.ious[part]).sum()
    l1 = (pos.raw[:, :4] - pos.l1_targets).abs().sum().where(x.l1_gain > 0, 0)
    terms = [total / x.normaliser for total in (x.iou_gain * iou, obj, cls, l1)]
    return YOLOXLossOutputs(torch.stack(terms).sum(), *terms)


def _gradient(x: YOLOXLoss | YOLOXLossBackward, pos: "_Positives", scale: Tensor) -> GradPreds:
    """Gradient of the raw predictions, in their layout; ``scale`` () multiplies that of every sum over anchors."""
    preds, is_iou = x.preds, x.iou_loss == "iou"
    if scale.isnan():
        return GradPreds(torch.full_like(preds, torch.nan))
    result = untouched_zeros_like(preds)
    for block in blocks(preds[..., 4:5]):
        result[..., 4:5][block] = working(preds[..., 4:5][block]).sigmoid().mul_(scale)

    overlaps = overlap(pos.boxes, pos.gt_boxes, x.iou_loss, 1e-16)[:, None]
    slope = -2 * overlaps if is_iou else -share(overlaps.abs() < 1, overlaps.abs() == 1)
    grad_boxes = x.iou_gain * slope * overlap_derivative(pos.boxes, pos.gt_boxes, x.iou_loss, 1e-16)
    grad_raw = yolox_raw_grad(grad_boxes, pos.raw[:, 2:4], pos.strides)
    grad_raw = grad_raw.where(~grad_raw.isnan(), 0)  # of a finite prediction whose box overflows
    grad_raw += torch.sign(pos.raw[:, :4] - pos.l1_targets) * x.l1_gain
    grad_obj = pos.raw[:, 4:].sigmoid() - 1
    result[pos.images, pos.anchors, :5] = torch.cat([grad_raw, grad_obj], 1).mul_(scale).to(result.dtype)
    for part, images, anchors in pos.parts(preds.shape[2]):
        grad_cls = working(preds[images, anchors, 5:]).sigmoid()
        grad_cls[torch.arange(len(images), device=preds.device), pos.labels[part]] -= pos.ious[part]
        result[images, anchors, 5:] = grad_cls.mul_(scale).to(result.dtype)
    return GradPreds(result)


class _Positives:
    """The positive anchors (M) with what both directions need of them, in pixels from the corner of their cell."""

    def __init__(self, x: YOLOXLoss | YOLOXLossBackward) -> None:
        preds = x.preds
        points, point_strides = anchor_table(x.levels, preds)
        self.images, self.anchors = (x.target_row >= 0).nonzero().unbind(-1)
        self.rows = x.target_row[self.images, self.anchors].long()
        self.labels, self.ious = x.gt_labels[self.rows], x.matched_iou[self.images, self.anchors]
        self.raw = working(preds[self.images, self.anchors, :5])
        self.label_logits = working(preds[self.images, self.anchors, 5 + self.labels])
        corner, self.strides = points.T[self.anchors] - 0.5, point_strides[self.anchors][:, None]
        gt_xywh = x.gt_boxes.to(points.dtype)[self.rows]
        # Boxes from the corner of the cell: far from the origin float32 would round the overlap's derivative to 1e-5.
        centre, half = gt_xywh[:, :2] - corner * self.strides, gt_xywh[:, 2:] / 2
        self.gt_boxes = torch.cat([centre - half, centre + half], -1)
        self.boxes = boxes_from_raw(self.raw, torch.full_like(corner, 0.5), self.strides[:, 0])
        gt_cell = gt_xywh / self.strides
        self.l1_targets = torch.cat([gt_cell[:, :2] - corner, torch.log(gt_cell[:, 2:] + 1e-8)], -1)

    def parts(self, num_channels: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some positives at a time, few enough that their classes stay in the processor's cache; their images and anchors."""
        for part in row_parts(self.rows, num_channels):
            yield part, self.images[part], self.anchors[part]
