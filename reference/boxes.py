"""Boxes and the IoU family (IoU; GIoU, arXiv 1902.09630; DIoU and CIoU, arXiv 1911.08287)."""

import math

import torch
from torch import Tensor


def working_precision(x: Tensor) -> Tensor:
    """Return ``x`` in the type that everything is computed in: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.float()


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners from (centre x, centre y, width, height)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(Centre x, centre y, width, height) from corners."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def bbox_iou(a: Tensor, b: Tensor, *, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """Overlap of boxes ``a`` and ``b`` (..., 4) in xyxy, element by element with broadcasting.

    ``eps`` is added to both heights, to the union and to the enclosing measure. The height of GIoU's enclosing box has that of
    both, so that it is never smaller than the union. Boxes that touch are a tie: half of the derivative of an intersection.
    But for GIoU, boxes that reach over more than 1e19 in float32 are past what squares and areas can hold.
    """
    ax1, ay1, ax2, ay2 = working_precision(a).unbind(-1)
    bx1, by1, bx2, by2 = working_precision(b).unbind(-1)
    if kind == "giou":
        ax1, ax2, bx1, bx2 = _in_range(ax1, ax2, bx1, bx2)
        ay1, ay2, by1, by2 = _in_range(ay1, ay2, by1, by2)
    wa, ha = ax2 - ax1, ay2 - ay1 + eps
    wb, hb = bx2 - bx1, by2 - by1 + eps
    inter_w = torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)
    inter_h = torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    inter = torch.maximum(inter_w, torch.zeros_like(inter_w)) * torch.maximum(inter_h, torch.zeros_like(inter_h))
    union = wa * ha + wb * hb - inter + eps
    iou = inter / union
    if kind == "iou":
        return iou
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if kind == "giou":
        enclosing_area = enclosing_w * (enclosing_h + 2 * eps) + eps
        return iou - (enclosing_area - union) / enclosing_area
    diagonal2 = enclosing_w**2 + enclosing_h**2 + eps
    dx = (ax1 + ax2 - bx1 - bx2) / 2
    dy = (ay1 + ay2 - by1 - by2) / 2
    diou = iou - (dx**2 + dy**2) / diagonal2
    if kind == "diou":
        return diou
    if kind != "ciou":
        raise ValueError(f"kind must be 'iou', 'giou', 'diou' or 'ciou', got {kind!r}")
    v = 4 / math.pi**2 * (torch.atan(wb / hb) - torch.atan(wa / ha)) ** 2
    weight = (v / (1 - iou + v + eps)).detach()
    return diou - weight * v


def _in_range(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """Ends of a and b on one axis, far apart ones by a scale at which areas are numbers: GIoU does not depend on it."""
    extent = torch.maximum(a2, b2) - torch.minimum(a1, b1)
    scale = torch.ones_like(extent).masked_fill(extent > 2.0**63, 2.0**-66)
    return a1 * scale, a2 * scale, b1 * scale, b2 * scale
