"""Oriented boxes (cx, cy, w, h, angle in radians from x to y) and their probabilistic IoU (arXiv 2106.06072)."""

import math

import torch
from torch import Tensor

from .boxes import working_precision
from .dfl import expected_distances
from .task_aligned import Geometry


def covariance(boxes: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variance by x and by y, covariance and the determinant of the three, of boxes (..., 5) as uniform distributions.

    ``floor`` is added to the variances along the box's own axes.
    """
    _, _, width, height, angle = boxes.unbind(-1)
    along, across = width**2 / 12 + floor, height**2 / 12 + floor
    cos, sin = angle.cos(), angle.sin()
    by_x, by_y = along * cos**2 + across * sin**2, along * sin**2 + across * cos**2
    return by_x, by_y, (along - across) * cos * sin, along * across


def prob_iou(a: Tensor, b: Tensor, *, eps: float = 1e-7, floor: float = 0.0) -> Tensor:
    """1 less the Hellinger distance of boxes ``a`` and ``b`` (..., 5) as Gaussians, by their Bhattacharyya distance.

    ``eps`` is added to every denominator, to what the logarithm and the root are taken of, and is the least Bhattacharyya
    distance; the largest is 100. Past either there is no gradient.
    """
    a, b = working_precision(a), working_precision(b)
    (a1, b1, c1, d1), (a2, b2, c2, d2) = covariance(a, floor), covariance(b, floor)
    dx, dy = (a[..., :2] - b[..., :2]).unbind(-1)
    determinant = (a1 + a2) * (b1 + b2) - (c1 + c2) ** 2
    apart = ((a1 + a2) * dy**2 + (b1 + b2) * dx**2 - 2 * (c1 + c2) * dx * dy) / (determinant + eps)
    distance = apart / 4 + torch.log(determinant / (4 * torch.sqrt(d1 * d2) + eps) + eps) / 2
    return 1 - torch.sqrt(1 - torch.exp(-distance.clamp(eps, 100)) + eps)


def turn(offsets: Tensor, angle: Tensor) -> Tensor:
    """Rotate vectors (..., 2) by angles (...)."""
    x, y = offsets.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def sides_from(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (left, top, right, bottom) from ``points`` (..., 2) to the sides of ``boxes`` (..., 5), along its axes."""
    offset = turn(points - boxes[..., :2], -boxes[..., 4])
    half = boxes[..., 2:4] / 2
    return torch.cat([half + offset, half - offset], -1)


def contains(boxes: Tensor, points: Tensor, min_side: float, eps: float) -> Tensor:
    """Whether ``points`` (..., 2) lie in ``boxes`` (..., 5), widened to ``min_side``, edges included: ``eps`` has no part."""
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:4].clamp(min=min_side), boxes[..., 4:]], -1)
    return (sides_from(points, boxes) >= 0).all(-1)


def is_oriented_box(boxes: Tensor) -> Tensor:
    """Whether each box (..., 5) has finite numbers and two positive sides."""
    return boxes.isfinite().all(-1) & (boxes[..., 2:4] > 0).all(-1)


ORIENTED = Geometry(is_oriented_box, contains, prob_iou)


def decode_angle(logits: Tensor) -> Tensor:
    """Angles from -pi/4 to 3/4 pi of logits, as YOLOv8 and YOLO11 put them out."""
    return (working_precision(logits).sigmoid() - 0.25) * math.pi


def decode_oriented(
    pred_dist: Tensor, pred_angle: Tensor, anchor_points: Tensor, *, reg_max: int = 16, strides: Tensor | None = None
) -> Tensor:
    """Boxes (B, A, 5) in cells, or in pixels if ``strides`` (A,) are given, of angles (B, A, 1) in radians.

    The four distances are along the axes of the box, whose centre lies off the anchor point by half their differences.
    """
    left_top, right_bottom = expected_distances(pred_dist, reg_max).chunk(2, -1)
    angle = working_precision(pred_angle)
    centre = anchor_points.to(angle.dtype) + turn((right_bottom - left_top) / 2, angle.squeeze(-1))
    scale = torch.ones_like(angle[0]) if strides is None else strides.to(angle.dtype)[:, None]
    return torch.cat([centre * scale, (left_top + right_bottom) * scale, angle], -1)
