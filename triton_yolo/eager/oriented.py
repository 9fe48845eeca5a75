"""ProbIoU of oriented boxes (cx, cy, w, h, angle) and its derivative, element by element (arXiv 2106.06072).

A box is a Gaussian with deviations ``along`` and ``across`` its axes. For two of them, turned by an angle d against each other,
the determinant of the sum of covariances is ``areas`` + ``excess``, with ``areas`` 4 times the root of both determinants and

    excess = (along1 across1 - along2 across2)^2
             + cos^2 d (along1 across2 - across1 along2)^2 + sin^2 d (along1 along2 - across1 across2)^2,

and the offset (u, v) of the centres by that sum is a sum of squares too, (across u)^2 + (along v)^2 in the frames of both, over
the determinant. So nothing cancels where boxes are long or nearly equal, as it does in terms of x and y.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working
from .._signatures import GradBoxes, Overlaps, ProbIoU, ProbIoUBackward


class _Gaussian(NamedTuple):
    """Centre, deviations along and across the axes, and the angle of a box, with cosine and sine."""

    x: Tensor
    y: Tensor
    along: Tensor
    across: Tensor
    angle: Tensor
    cos: Tensor
    sin: Tensor


def _gaussian(boxes: Iterable[Tensor], floor: float) -> _Gaussian:
    x, y, width, height, angle = boxes
    along, across = ((side.square() / 12 + floor).sqrt() for side in (width, height))
    return _Gaussian(x, y, along, across, angle, angle.cos(), angle.sin())


class _Pair(NamedTuple):
    """Both boxes, cosine and sine of the turn from b to a, and the offset from b to a in both frames."""

    a: _Gaussian
    b: _Gaussian
    cos: Tensor
    sin: Tensor
    u_a: Tensor
    v_a: Tensor
    u_b: Tensor
    v_b: Tensor

    def differences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of products of deviations: of either box, and of one along and the other across it or along it."""
        a, b = self.a, self.b
        return (
            (a.along * a.across).addcmul_(b.along, b.across, value=-1),
            (a.along * b.across).addcmul_(a.across, b.along, value=-1),
            (a.along * b.along).addcmul_(a.across, b.across, value=-1),
        )

    def measures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Excess, areas, and the squared offset by the sum of covariances times its determinant."""
        a, b, (of_boxes, crossed, aligned) = self.a, self.b, self.differences()
        excess = _sum_of_squares(of_boxes, crossed.mul_(self.cos), aligned.mul_(self.sin))
        areas = (4 * a.along).mul_(a.across).mul_(b.along).mul_(b.across)
        apart = _sum_of_squares(a.across * self.u_a, a.along * self.v_a, b.across * self.u_b, b.along * self.v_b)
        return excess, areas, apart


def _sum_of_squares(x: Tensor, *others: Tensor) -> Tensor:
    """The sum, in place of ``x``."""
    x.square_()
    for other in others:
        x.addcmul_(other, other)
    return x


def _in_frame(dx: Tensor, dy: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of a vector along and across."""
    return (dx * cos).addcmul_(dy, sin), (dy * cos).addcmul_(dx, sin, value=-1)


def _pair(a: _Gaussian, b: _Gaussian) -> _Pair:
    turn, dx, dy = a.angle - b.angle, a.x - b.x, a.y - b.y
    return _Pair(a, b, turn.cos(), turn.sin(), *_in_frame(dx, dy, a.cos, a.sin), *_in_frame(dx, dy, b.cos, b.sin))


def _distance(excess: Tensor, areas: Tensor, apart: Tensor, eps: float) -> Tensor:
    """Bhattacharyya distance, not yet between its bounds."""
    shape = (excess - eps).div_(areas + eps).add_(eps).log1p_()
    return (apart / (excess + areas).add_(eps)).div_(4).add_(shape, alpha=0.5)


def _hellinger(distance: Tensor, eps: float) -> Tensor:
    return (-distance).expm1_().neg_().add_(eps).sqrt_()


def _similarity(distance: Tensor, eps: float) -> Tensor:
    return 1 - _hellinger(distance.clamp(eps, 100), eps)


class ProbOverlap:
    """ProbIoU of boxes ``a`` and ``b`` (..., 5) and its derivative, of which each takes what the other has computed."""

    def __init__(self, a: Tensor, b: Tensor, eps: float, floor: float) -> None:
        boxes = working(a).unbind(-1)
        self._sides, self._eps = boxes[2:4], eps
        self._pair = _pair(_gaussian(boxes, floor), _gaussian(working(b).unbind(-1), floor))
        self._measures = self._pair.measures()
        self._distance = _distance(*self._measures, eps)

    def value(self) -> Tensor:
        """(...,)."""
        return _similarity(self._distance, self._eps)

    def derivative(self) -> Tensor:
        """By ``a``: (..., 5). It is symmetric, so the derivative by ``b`` is that of (b, a)."""
        x, (excess, areas, apart), distance, eps = self._pair, self._measures, self._distance, self._eps
        is_bounded = (distance < eps) | (distance > 100)
        d_distance = (-torch.exp(-distance) / 2 / _hellinger(distance.clamp(eps, 100), eps)).masked_fill(is_bounded, 0)

        determinant, whole = excess + areas + eps, areas + eps
        d_apart = d_distance / 4 / determinant
        d_determinant = -d_apart * (apart / determinant)
        d_shape = d_distance / 2 / ((excess + areas) / whole + eps) / whole
        d_excess = d_determinant + d_shape
        d_areas = d_determinant - d_shape * ((excess - eps) / whole)

        own, other, (of_boxes, crossed, aligned) = x.a, x.b, x.differences()
        crossed, aligned = crossed * x.cos.square(), aligned * x.sin.square()
        d_along = (
            2 * d_excess * (of_boxes * own.across + crossed * other.across + aligned * other.along)
            + 4 * d_areas * own.across * other.along * other.across
            + 2 * d_apart * own.along * x.v_a.square()
        )
        d_across = (
            2 * d_excess * (of_boxes * own.along - crossed * other.along - aligned * other.across)
            + 4 * d_areas * own.along * other.along * other.across
            + 2 * d_apart * own.across * x.u_a.square()
        )
        d_turn = 2 * d_excess * x.sin * x.cos * (own.along.square() - own.across.square()) * (
            other.along.square() - other.across.square()
        ) + 2 * d_apart * x.u_a * x.v_a * (own.across.square() - own.along.square())

        pull_u, pull_v = own.across.square() * x.u_a, own.along.square() * x.v_a
        pull_u, pull_v = (
            other.across.square() * x.u_b + pull_u * x.cos - pull_v * x.sin,
            other.along.square() * x.v_b + pull_u * x.sin + pull_v * x.cos,
        )
        d_x = 2 * d_apart * (pull_u * other.cos - pull_v * other.sin)
        d_y = 2 * d_apart * (pull_u * other.sin + pull_v * other.cos)
        d_width, d_height = (
            torch.where(deviation == 0, 0, d * side / (12 * deviation))
            for d, side, deviation in zip((d_along, d_across), self._sides, (own.along, own.across), strict=True)
        )
        return torch.stack([d_x, d_y, d_width, d_height, d_turn], -1)


def turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Vectors (2, ...), each turned by an angle (...)."""
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


def gaussians(boxes: Tensor) -> Tensor:
    """What an overlap is made of, of boxes (5, n): (7, n)."""
    return torch.stack(_gaussian(boxes, 0.0))


def gaussian_overlap(a: Tensor, b: Tensor) -> Tensor:
    """ProbIoU (P,) of ``gaussians`` (7, P)."""
    return _similarity(_distance(*_pair(_Gaussian(*a), _Gaussian(*b)).measures(), 1e-7), 1e-7)


def axes(boxes: Tensor) -> Tensor:
    """Centres, cosines and sines of angles, and halves of both sides of boxes (5, n): (6, n)."""
    x, y, width, height, angle = boxes
    return torch.stack([x, y, angle.cos(), angle.sin(), width / 2, height / 2])


def span_oriented(columns: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """Where on the x axis boxes, given by ``axes``, begin and end at heights (n,), and a hair more."""
    x, y, cos, sin, half_width, half_height = columns
    dy, hair = heights - y, 1e-5 * (half_width + half_height + x.abs() + y.abs())
    ends = []
    for along, across, half in ((cos, sin, half_width), (-sin, cos, half_height)):
        # |x along + dy across| <= half; where ``along`` is nothing, a hair over it is longer than the box.
        along = torch.where(along.abs() < 1e-9, 1e-9, along)
        ends.append((-dy * across / along, (half + hair) / along.abs()))
    (a, reach_a), (b, reach_b) = ends
    return x + torch.maximum(a - reach_a, b - reach_b), x + torch.minimum(a + reach_a, b + reach_b)


def is_inside_oriented(points: Tensor, columns: Tensor, eps: float) -> Tensor:
    """Whether points (2, P) lie inside boxes or on an edge, by ``axes``; ``eps`` has no part."""
    x, y, cos, sin, half_width, half_height = columns
    u, v = _in_frame(points[0] - x, points[1] - y, cos, sin)
    return (u.abs() <= half_width) & (v.abs() <= half_height)


def prob_iou(x: ProbIoU) -> Overlaps:
    return Overlaps(ProbOverlap(x.a, x.b, x.eps, x.floor).value())


def prob_iou_backward(x: ProbIoUBackward) -> GradBoxes:
    grad_a = x.grad[..., None] * ProbOverlap(x.a, x.b, x.eps, x.floor).derivative()
    grad_b = x.grad[..., None] * ProbOverlap(x.b, x.a, x.eps, x.floor).derivative()
    return GradBoxes(grad_a.to(x.a.dtype), grad_b.to(x.b.dtype))
