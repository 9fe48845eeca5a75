"""ProbIoU of oriented boxes (cx, cy, w, h, angle) and its derivative, element by element (arXiv 2106.06072).

A box is a Gaussian with deviations ``along`` and ``across`` its axes. For two of them, turned by an angle d against each other,
the determinant of the sum of covariances is ``areas`` + ``excess``, with ``areas`` 4 times the root of both determinants and

    excess = (along1 across1 - along2 across2)^2
             + cos^2 d (along1 across2 - across1 along2)^2 + sin^2 d (along1 along2 - across1 across2)^2,

and the offset (u, v) of the centres by that sum is a sum of squares too, (across u)^2 + (along v)^2 in the frames of both, over
the determinant. So nothing cancels where boxes are long or nearly equal, as it does in terms of x and y.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working
from .._signatures import GradBoxes, Overlaps, ProbIoU, ProbIoUBackward


class _Pair(NamedTuple):
    """Deviations of both boxes, the turn from b to a, and the offset from b to a in the image's direction and both frames."""

    along_a: Tensor
    across_a: Tensor
    along_b: Tensor
    across_b: Tensor
    cos: Tensor
    sin: Tensor
    cos_b: Tensor
    sin_b: Tensor
    u_a: Tensor
    v_a: Tensor
    u_b: Tensor
    v_b: Tensor

    def differences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of products of deviations: of either box, and of one along and the other across it or along it."""
        of_boxes = self.along_a * self.across_a - self.along_b * self.across_b
        crossed = self.along_a * self.across_b - self.across_a * self.along_b
        return of_boxes, crossed, self.along_a * self.along_b - self.across_a * self.across_b

    def measures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Excess, areas, and the squared offset by the sum of covariances times its determinant."""
        of_boxes, crossed, aligned = self.differences()
        excess = of_boxes.square() + (crossed * self.cos).square() + (aligned * self.sin).square()
        areas = 4 * self.along_a * self.across_a * self.along_b * self.across_b
        apart_a = (self.across_a * self.u_a).square() + (self.along_a * self.v_a).square()
        apart_b = (self.across_b * self.u_b).square() + (self.along_b * self.v_b).square()
        return excess, areas, apart_a + apart_b


def _pair(a: Tensor, b: Tensor, floor: float) -> _Pair:
    ax, ay, aw, ah, a_angle = working(a).unbind(-1)
    bx, by, bw, bh, b_angle = working(b).unbind(-1)
    along_a, across_a, along_b, across_b = ((side.square() / 12 + floor).sqrt() for side in (aw, ah, bw, bh))
    turn = a_angle - b_angle
    cos, sin, cos_b, sin_b = turn.cos(), turn.sin(), b_angle.cos(), b_angle.sin()
    dx, dy = ax - bx, ay - by
    u_b, v_b = dx * cos_b + dy * sin_b, dy * cos_b - dx * sin_b
    u_a, v_a = u_b * cos + v_b * sin, v_b * cos - u_b * sin
    return _Pair(along_a, across_a, along_b, across_b, cos, sin, cos_b, sin_b, u_a, v_a, u_b, v_b)


def _distance(excess: Tensor, areas: Tensor, apart: Tensor, eps: float) -> Tensor:
    """Bhattacharyya distance, not yet between its bounds."""
    shape = torch.log1p((excess - eps) / (areas + eps) + eps)
    return apart / (excess + areas + eps) / 4 + shape / 2


def _hellinger(distance: Tensor, eps: float) -> Tensor:
    return (eps - torch.expm1(-distance)).sqrt()


def prob_overlap(a: Tensor, b: Tensor, eps: float, floor: float) -> Tensor:
    """ProbIoU of boxes (..., 5)."""
    return 1 - _hellinger(_distance(*_pair(a, b, floor).measures(), eps).clamp(eps, 100), eps)


def prob_overlap_derivative(a: Tensor, b: Tensor, eps: float, floor: float) -> Tensor:
    """Derivative of ProbIoU by ``a``: (..., 5). It is symmetric, so the derivative by ``b`` is that of (b, a)."""
    x = _pair(a, b, floor)
    excess, areas, apart = x.measures()
    distance = _distance(excess, areas, apart, eps)
    is_bounded = (distance < eps) | (distance > 100)
    d_distance = (-torch.exp(-distance) / 2 / _hellinger(distance.clamp(eps, 100), eps)).masked_fill(is_bounded, 0)

    determinant, whole = excess + areas + eps, areas + eps
    d_apart = d_distance / 4 / determinant
    d_determinant = -d_apart * (apart / determinant)
    d_shape = d_distance / 2 / ((excess + areas) / whole + eps) / whole
    d_excess = d_determinant + d_shape
    d_areas = d_determinant - d_shape * ((excess - eps) / whole)

    of_boxes, crossed, aligned = x.differences()
    crossed, aligned = crossed * x.cos.square(), aligned * x.sin.square()
    d_along = (
        2 * d_excess * (of_boxes * x.across_a + crossed * x.across_b + aligned * x.along_b)
        + 4 * d_areas * x.across_a * x.along_b * x.across_b
        + 2 * d_apart * x.along_a * x.v_a.square()
    )
    d_across = (
        2 * d_excess * (of_boxes * x.along_a - crossed * x.along_b - aligned * x.across_b)
        + 4 * d_areas * x.along_a * x.along_b * x.across_b
        + 2 * d_apart * x.across_a * x.u_a.square()
    )
    d_turn = 2 * d_excess * x.sin * x.cos * (x.along_a.square() - x.across_a.square()) * (
        x.along_b.square() - x.across_b.square()
    ) + 2 * d_apart * x.u_a * x.v_a * (x.across_a.square() - x.along_a.square())

    pull_u, pull_v = x.across_a.square() * x.u_a, x.along_a.square() * x.v_a
    pull_u, pull_v = (
        x.across_b.square() * x.u_b + pull_u * x.cos - pull_v * x.sin,
        x.along_b.square() * x.v_b + pull_u * x.sin + pull_v * x.cos,
    )
    d_x = 2 * d_apart * (pull_u * x.cos_b - pull_v * x.sin_b)
    d_y = 2 * d_apart * (pull_u * x.sin_b + pull_v * x.cos_b)
    _, _, width, height, _ = working(a).unbind(-1)
    d_width, d_height = (
        torch.where(deviation == 0, 0, d * side / (12 * deviation))
        for d, side, deviation in ((d_along, width, x.along_a), (d_across, height, x.across_a))
    )
    return torch.stack([d_x, d_y, d_width, d_height, d_turn], -1)


def turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Vectors (2, n), each turned by an angle (n,)."""
    (x, y), cos, sin = vectors, angle.cos(), angle.sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos])


def widen_oriented(boxes: Tensor, min_side: float) -> Tensor:
    """Widen every side of boxes (n, 5) shorter than ``min_side`` to it."""
    return torch.cat([boxes[:, :2], boxes[:, 2:4].clamp(min=min_side), boxes[:, 4:]], 1)


def upright_bounds(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners (n, 2) of upright rectangles around boxes (n, 5), a hair wider than they need to be."""
    centre, half = boxes[:, :2], boxes[:, 2:4] / 2
    cos, sin = boxes[:, 4:].cos().abs(), boxes[:, 4:].sin().abs()
    reach = half * cos + half.flip(1) * sin
    reach = reach + 1e-5 * (reach + centre.abs())
    return centre - reach, centre + reach


def is_inside_oriented(points: Tensor, boxes: Tensor, eps: float) -> Tensor:
    """Whether points (2, P) lie inside boxes (5, P) or on an edge; ``eps`` has no part."""
    dx, dy = points - boxes[:2]
    cos, sin = boxes[4].cos(), boxes[4].sin()
    return ((dx * cos + dy * sin).abs() <= boxes[2] / 2) & ((dy * cos - dx * sin).abs() <= boxes[3] / 2)


def prob_iou(x: ProbIoU) -> Overlaps:
    return Overlaps(prob_overlap(x.a, x.b, x.eps, x.floor))


def prob_iou_backward(x: ProbIoUBackward) -> GradBoxes:
    grad_a = x.grad[..., None] * prob_overlap_derivative(x.a, x.b, x.eps, x.floor)
    grad_b = x.grad[..., None] * prob_overlap_derivative(x.b, x.a, x.eps, x.floor)
    return GradBoxes(grad_a.to(x.a.dtype), grad_b.to(x.b.dtype))
