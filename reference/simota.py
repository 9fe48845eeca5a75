"""Simplified optimal-transport assignment (YOLOX, arXiv 2107.08430; OTA, arXiv 2103.14259)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import bbox_iou, working_precision, xyxy_to_xywh
from .targets import is_box

INFEASIBLE_COST = 1e6
MAX_DYNAMIC_K = 10


class SimOTAResult(NamedTuple):
    fg_mask: Tensor
    target_gt_idx: Tensor
    matched_iou: Tensor
    num_fg: Tensor


def decode_yolox(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Raw (B, A, 4+) of (dx, dy, log w, log h, ...) to boxes xyxy in pixels; ``anchor_points`` are cell centres in cells."""
    raw = working_precision(preds[..., :4])
    strides = strides.to(raw.dtype)[:, None]
    centre = (anchor_points.to(raw.dtype) - 0.5 + raw[..., :2]) * strides
    size = raw[..., 2:].exp() * strides
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def find_regions(
    anchor_points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    centres: Tensor,
    is_gt: Tensor,
    candidates: str,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """Which anchors take part in each image (B, A), and which pairs are feasible (B, G, A)."""
    in_centre = ((anchor_points - centres[:, :, None]).abs() < radius * strides[:, None]).all(-1) & is_gt[..., None]
    if candidates == "center":
        return in_centre.any(1), in_centre
    to_sides = torch.cat([anchor_points - boxes[:, :, None, :2], boxes[:, :, None, 2:] - anchor_points], -1)
    in_box = (to_sides > 0).all(-1) & is_gt[..., None]
    return (in_box | in_centre).any(1), in_box & in_centre


def classification_cost(cls_logits: Tensor, obj_logits: Tensor, labels: Tensor) -> Tensor:
    """BCE of sqrt(class probability * objectness) against the one-hot class, summed over classes: (G, A)."""
    probs = (cls_logits.sigmoid() * obj_logits.sigmoid()[:, None]).sqrt()
    log_p, log_not_p = probs.log().clamp(min=-100), torch.log1p(-probs).clamp(min=-100)
    one_hot = torch.nn.functional.one_hot(labels, cls_logits.shape[-1]).to(probs.dtype)
    return -(one_hot[:, None] * log_p + (1 - one_hot[:, None]) * log_not_p).sum(-1)


def dynamic_k(ious: Tensor) -> Tensor:
    """max(1, floor of the sum of the 10 largest IoUs) of every ground truth over (G, n); the sum is taken in float64."""
    return ious.double().topk(min(MAX_DYNAMIC_K, ious.shape[1]), dim=1).values.sum(1).floor().long().clamp(min=1)


def match(cost: Tensor, k: Tensor) -> Tensor:
    """Every ground truth takes its ``k`` cheapest anchors; one taken by several goes to the cheapest of all: bool (G, n)."""
    rank = cost.argsort(dim=1, stable=True).argsort(dim=1)
    taken = rank < k[:, None]
    is_contested = taken.sum(0) > 1
    cheapest = torch.zeros_like(taken).scatter(0, cost.argsort(dim=0, stable=True)[:1], True)
    return torch.where(is_contested, cheapest, taken)


def simota_assign(
    cls_logits: Tensor,
    obj_logits: Tensor,
    pred_bboxes: Tensor,
    anc_points: Tensor,
    strides: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    candidates: str = "center",
    center_radius: float = 1.5,
    gt_centres: Tensor | None = None,
) -> SimOTAResult:
    """Assign ground truths to anchors. A background anchor has slot 0 and IoU 0. Points and boxes are in pixels."""
    batch_size, num_anchors = obj_logits.shape[:2]
    cls_logits, obj_logits = working_precision(cls_logits), working_precision(obj_logits).reshape(batch_size, -1)
    pred_bboxes, gt_bboxes = working_precision(pred_bboxes), working_precision(gt_bboxes)
    centres = xyxy_to_xywh(gt_bboxes)[..., :2] if gt_centres is None else gt_centres
    is_gt = mask_gt.reshape(gt_bboxes.shape[:2]).bool() & is_box(gt_bboxes)
    takes_part, feasible = find_regions(
        working_precision(anc_points), working_precision(strides), gt_bboxes, centres, is_gt, candidates, center_radius
    )
    fg_mask = torch.zeros(batch_size, num_anchors, dtype=torch.bool, device=cls_logits.device)
    slot = torch.zeros(batch_size, num_anchors, dtype=torch.long, device=cls_logits.device)
    matched_iou = cls_logits.new_zeros(batch_size, num_anchors)
    for image in range(batch_size):
        anchors, slots = takes_part[image].nonzero().flatten(), is_gt[image].nonzero().flatten()
        if len(anchors) == 0:
            continue
        ious = bbox_iou(gt_bboxes[image, slots][:, None], pred_bboxes[image, anchors], kind="iou", eps=0.0)
        ious = ious.nan_to_num(nan=0.0)
        labels = gt_labels.reshape(batch_size, -1)[image, slots].long()
        cost = classification_cost(cls_logits[image, anchors], obj_logits[image, anchors], labels)
        cost = cost + 3.0 * -torch.log(ious + 1e-8)
        cost = torch.where(feasible[image][slots][:, anchors], cost, cost + INFEASIBLE_COST)
        matching = match(cost.nan_to_num(nan=torch.inf), dynamic_k(ious))
        gt, anchor = matching.nonzero(as_tuple=True)
        fg_mask[image, anchors[anchor]] = True
        slot[image, anchors[anchor]] = slots[gt]
        matched_iou[image, anchors[anchor]] = ious[gt, anchor]
    return SimOTAResult(fg_mask, slot, matched_iou, fg_mask.sum())
