"""Task-aligned assignment (TOOD, arXiv 2108.07755) with an exact tie rule for every choice."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import bbox_iou, working_precision
from .targets import is_box


class Geometry(NamedTuple):
    """What assignment asks about boxes (..., n)."""

    is_box: Callable[[Tensor], Tensor]
    """Whether each box counts."""
    contains: Callable[[Tensor, Tensor, float, float], Tensor]
    """Whether the boxes, widened to a shortest side, have points (..., 2) inside by more than an eps."""
    overlap: Callable[[Tensor, Tensor], Tensor]
    """Overlap of ground truths and predictions, element by element with broadcasting."""


class TaskAlignedResult(NamedTuple):
    target_labels: Tensor
    target_bboxes: Tensor
    target_scores: Tensor
    fg_mask: Tensor
    target_gt_idx: Tensor


def widen(boxes: Tensor, min_side: float) -> Tensor:
    """Widen every side shorter than ``min_side`` to it, about the centre of the box."""
    low, high = boxes[..., :2], boxes[..., 2:]
    centre = (low + high) / 2
    is_short = high - low < min_side
    return torch.cat(
        [torch.where(is_short, centre - min_side / 2, low), torch.where(is_short, centre + min_side / 2, high)], -1
    )


def contains(boxes: Tensor, points: Tensor, min_side: float, eps: float) -> Tensor:
    """Whether ``points`` (..., 2) lie inside ``boxes`` (..., 4), widened to ``min_side``, by more than ``eps``."""
    boxes = widen(boxes, min_side)
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1).amin(-1) > eps


def ciou(gt_bboxes: Tensor, pred_bboxes: Tensor) -> Tensor:
    return bbox_iou(gt_bboxes, pred_bboxes, kind="ciou")


AXIS_ALIGNED = Geometry(is_box, contains, ciou)


def is_gt(gt_bboxes: Tensor, mask_gt: Tensor, geometry: Geometry = AXIS_ALIGNED) -> Tensor:
    """Which slots (B, G) hold a ground truth."""
    return mask_gt.reshape(gt_bboxes.shape[:2]).bool() & geometry.is_box(gt_bboxes)


def find_candidates(
    anchor_points: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    min_box_side: float = 0.0,
    eps: float = 1e-9,
    geometry: Geometry = AXIS_ALIGNED,
) -> Tensor:
    """Which anchor points (A, 2) lie inside which ground truths (B, G, n): bool (B, G, A)."""
    anchor_points, gt_bboxes = working_precision(anchor_points), working_precision(gt_bboxes)
    inside = geometry.contains(gt_bboxes[:, :, None], anchor_points, min_box_side, eps)
    return inside & is_gt(gt_bboxes, mask_gt, geometry)[..., None]


def align_metric(
    pred_scores: Tensor,
    pred_bboxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    alpha: float,
    beta: float,
    min_box_side: float = 0.0,
    eps: float = 1e-9,
    geometry: Geometry = AXIS_ALIGNED,
) -> tuple[Tensor, Tensor]:
    """score^alpha * overlap^beta and the overlap, both (B, G, A) and 0 outside the candidates."""
    batch_size, num_gt = gt_bboxes.shape[:2]
    gt_bboxes = working_precision(gt_bboxes)
    boxes = working_precision(pred_bboxes)
    scores = working_precision(pred_scores)
    candidates = find_candidates(anchor_points, gt_bboxes, mask_gt, min_box_side=min_box_side, eps=eps, geometry=geometry)
    overlaps = geometry.overlap(gt_bboxes[:, :, None], boxes[:, None])
    overlaps = torch.where(candidates & (overlaps > 0), overlaps, torch.zeros_like(overlaps))
    labels = gt_labels.reshape(batch_size, num_gt, 1).long() * is_gt(gt_bboxes, mask_gt, geometry)[..., None]
    labels = labels.expand(-1, -1, scores.shape[1])
    score = scores.transpose(1, 2).gather(1, labels)
    metric = score.pow(alpha) * overlaps.pow(beta)
    return torch.where(candidates & (metric > 0), metric, torch.zeros_like(metric)), overlaps


def select_topk_candidates(metric: Tensor, topk: int, mask_gt: Tensor | None = None) -> Tensor:
    """The ``topk`` highest positive metrics of every ground truth, equal ones by the lower anchor: bool (B, G, A)."""
    order = metric.nan_to_num(nan=0.0).argsort(dim=-1, descending=True, stable=True)[..., :topk]
    selected = torch.zeros_like(metric, dtype=torch.bool).scatter(-1, order, True) & (metric > 0)
    return selected if mask_gt is None else selected & mask_gt.reshape(metric.shape[:2]).bool()[..., None]


def resolve_conflicts(claims: Tensor, overlaps: Tensor, candidates: Tensor) -> Tensor:
    """Leave every contested anchor to the highest overlap among its candidates, ties to the lower slot: bool (B, G, A)."""
    if claims.shape[1] == 0:
        return claims
    is_contested = claims.sum(1, keepdim=True) > 1
    winner = torch.argsort(overlaps.where(candidates, -1), dim=1, descending=True, stable=True)[:, :1]
    is_winner = torch.zeros_like(claims).scatter(1, winner, True)
    return torch.where(is_contested, is_winner, claims)


def normalised_scores(positives: Tensor, metric: Tensor, overlaps: Tensor, *, eps: float = 1e-9) -> Tensor:
    """Target score of every positive pair, 0 elsewhere: (B, G, A)."""
    metric, overlaps = metric * positives, overlaps * positives
    if metric.shape[-1] == 0:
        return metric
    return metric * overlaps.amax(-1, keepdim=True) / (metric.amax(-1, keepdim=True) + eps)


def task_aligned_assign(
    pd_scores: Tensor,
    pd_bboxes: Tensor,
    anc_points: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    topk: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
    eps: float = 1e-9,
    topk2: int | None = None,
    min_box_side: float = 0.0,
    geometry: Geometry = AXIS_ALIGNED,
) -> TaskAlignedResult:
    """Assign ground truths to anchors. A background anchor has label C, box 0, scores 0 and slot 0."""
    batch_size, num_anchors, num_classes = pd_scores.shape
    rule = {"min_box_side": min_box_side, "eps": eps, "geometry": geometry}
    metric, overlaps = align_metric(
        pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, alpha=alpha, beta=beta, **rule
    )  # fmt: skip
    candidates = find_candidates(anc_points, gt_bboxes, mask_gt, **rule)
    positives = resolve_conflicts(select_topk_candidates(metric, topk), overlaps, candidates)
    if topk2 is not None:
        positives = select_topk_candidates(metric * positives, topk2)
    scores = normalised_scores(positives, metric, overlaps, eps=eps)

    fg_mask = positives.any(1)
    if positives.shape[1] == 0:
        slot = torch.zeros(batch_size, num_anchors, dtype=torch.long, device=metric.device)
        labels = torch.full_like(slot, num_classes)
        boxes = metric.new_zeros(batch_size, num_anchors, gt_bboxes.shape[2])
    else:
        slot = positives.long().argmax(1)
        labels = gt_labels.reshape(batch_size, -1).long().gather(1, slot)
        labels = torch.where(fg_mask, labels, torch.full_like(labels, num_classes))
        boxes = gt_bboxes.to(metric.dtype).gather(1, slot[..., None].expand(-1, -1, gt_bboxes.shape[2])) * fg_mask[..., None]
    one_hot = labels[..., None] == torch.arange(num_classes, device=labels.device)
    return TaskAlignedResult(labels, boxes, scores.sum(1)[..., None] * one_hot, fg_mask, slot)
