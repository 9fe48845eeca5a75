"""The IoU family and its derivative, element by element."""

import math

import torch
from torch import Tensor

from .._precision import working
from .._signatures import BboxIoU, BboxIoUBackward, GradBoxes, Overlaps


def overlap(a: Tensor, b: Tensor, kind: str, eps: float) -> Tensor:
    """Overlap of boxes (..., 4) in xyxy."""
    ax1, ay1, ax2, ay2 = working(a).unbind(-1)
    bx1, by1, bx2, by2 = working(b).unbind(-1)
    if kind == "giou":
        ax1, ax2, bx1, bx2, _ = _in_range(ax1, ax2, bx1, bx2)
        ay1, ay2, by1, by2, _ = _in_range(ay1, ay2, by1, by2)
    wa, ha, wb, hb = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    inter_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    inter_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    inter = inter_w * inter_h
    union = wa * ha + wb * hb - inter + eps
    iou = inter / union
    if kind == "iou":
        return iou
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if kind == "giou":
        enclosing_area = enclosing_w * (enclosing_h + 2 * eps) + eps
        return iou - (enclosing_area - union) / enclosing_area
    diagonal2 = enclosing_w.square() + enclosing_h.square() + eps
    dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
    diou = iou - (dx.square() + dy.square()) / diagonal2
    if kind == "diou":
        return diou
    v = (4 / math.pi**2) * (torch.atan(wb / hb) - torch.atan(wa / ha)).square()
    return diou - v / (1 - iou + v + eps) * v


def overlap_derivative(a: Tensor, b: Tensor, kind: str, eps: float) -> Tensor:
    """Derivative of the overlap by the corners of ``a``: (..., 4).

    Where two sides coincide, each gets half of the derivative of their minimum or maximum, and where boxes touch, the overlap
    gets half of that of its maximum with 0. CIoU's trade-off weight is a constant. Every kind is symmetric, so the derivative
    by ``b`` is that of (b, a).
    """
    ax1, ay1, ax2, ay2 = working(a).unbind(-1)
    bx1, by1, bx2, by2 = working(b).unbind(-1)
    x_scale = y_scale = torch.ones((), dtype=ax1.dtype, device=ax1.device)
    if kind == "giou":
        ax1, ax2, bx1, bx2, x_scale = _in_range(ax1, ax2, bx1, bx2)
        ay1, ay2, by1, by2, y_scale = _in_range(ay1, ay2, by1, by2)
    wa, ha, wb, hb = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    overlap_w = torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)
    overlap_h = torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    inter = overlap_w.clamp(min=0) * overlap_h.clamp(min=0)
    union = wa * ha + wb * hb - inter + eps

    # Shares of a's sides in the intersection and, the other way round, in the enclosing box.
    x1_inner, x2_inner = share(ax1 > bx1, ax1 == bx1), share(ax2 < bx2, ax2 == bx2)
    y1_inner, y2_inner = share(ay1 > by1, ay1 == by1), share(ay2 < by2, ay2 == by2)

    d_inter, d_union = 1 / union, -(inter / union) / union  # a square overflows for sides from 4e9 on
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    d_wa = d_ha = d_enclosing_w = d_enclosing_h = d_dx = d_dy = torch.zeros_like(union)
    if kind == "giou":
        enclosing_area = enclosing_w * (enclosing_h + 2 * eps) + eps
        d_union = d_union + 1 / enclosing_area
        d_enclosing_area = -(union / enclosing_area) / enclosing_area
        d_enclosing_w, d_enclosing_h = d_enclosing_area * (enclosing_h + 2 * eps), d_enclosing_area * enclosing_w
    elif kind in ("diou", "ciou"):
        diagonal2 = enclosing_w.square() + enclosing_h.square() + eps
        dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
        d_diagonal2 = (dx.square() + dy.square()) / diagonal2 / diagonal2
        d_enclosing_w, d_enclosing_h = 2 * enclosing_w * d_diagonal2, 2 * enclosing_h * d_diagonal2
        d_dx, d_dy = -2 * dx / diagonal2, -2 * dy / diagonal2
    if kind == "ciou":
        delta = torch.atan(wb / hb) - torch.atan(wa / ha)
        v = (4 / math.pi**2) * delta.square()
        weight = v / (1 - inter / union + v + eps)
        d_angle = weight * (8 / math.pi**2) * delta
        radius2 = wa.square() + ha.square()
        d_wa, d_ha = d_angle * ha / radius2, -d_angle * wa / radius2

    d_inter = d_inter - d_union
    d_wa, d_ha = d_wa + d_union * ha, d_ha + d_union * wa
    d_overlap_w = _above_zero(overlap_w, d_inter * overlap_h.clamp(min=0))
    d_overlap_h = _above_zero(overlap_h, d_inter * overlap_w.clamp(min=0))
    return torch.stack(
        [
            (-d_wa - d_overlap_w * x1_inner - d_enclosing_w * (1 - x1_inner) + d_dx / 2) * x_scale,
            (-d_ha - d_overlap_h * y1_inner - d_enclosing_h * (1 - y1_inner) + d_dy / 2) * y_scale,
            (d_wa + d_overlap_w * x2_inner + d_enclosing_w * (1 - x2_inner) + d_dx / 2) * x_scale,
            (d_ha + d_overlap_h * y2_inner + d_enclosing_h * (1 - y2_inner) + d_dy / 2) * y_scale,
        ],
        -1,
    )


def bbox_iou(x: BboxIoU) -> Overlaps:
    return Overlaps(overlap(x.a, x.b, x.kind, x.eps))


def bbox_iou_backward(x: BboxIoUBackward) -> GradBoxes:
    grad_a = x.grad[..., None] * overlap_derivative(x.a, x.b, x.kind, x.eps)
    grad_b = x.grad[..., None] * overlap_derivative(x.b, x.a, x.kind, x.eps)
    return GradBoxes(grad_a.to(x.a.dtype), grad_b.to(x.b.dtype))


def _in_range(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """Ends of a and b on one axis by a scale at which areas are numbers, and the scale, which GIoU does not depend on."""
    extent = torch.maximum(a2, b2) - torch.minimum(a1, b1)
    scale = torch.ones_like(extent).masked_fill_(extent > 2.0**63, 2.0**-66)
    return a1 * scale, a2 * scale, b1 * scale, b2 * scale, scale


def _above_zero(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``x`` from that of its maximum with 0."""
    return torch.where(x > 0, grad, torch.where(x == 0, grad / 2, 0))


def share(is_own: Tensor, is_tie: Tensor) -> Tensor:
    """How much of the derivative of a minimum or maximum is due to one of its arguments: half of it at a tie."""
    return is_own.float() + 0.5 * is_tie.float()
