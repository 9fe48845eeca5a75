"""Pure tile functions of oriented boxes: ProbIoU with its derivative. The eager twin explains the formulas."""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import log1p

_PER_PI: tl.constexpr = tl.constexpr(1 / math.pi)
# Pi in three parts: multiples of the first two are exact in float32.
_PI_HIGH: tl.constexpr = tl.constexpr(3.140625)
_PI_MIDDLE: tl.constexpr = tl.constexpr(round((math.pi - 3.140625) * 2**22) / 2**22)
_PI_LOW: tl.constexpr = tl.constexpr(math.pi - 3.140625 - round((math.pi - 3.140625) * 2**22) / 2**22)


class Oriented(NamedTuple):
    """Boxes by centre, sides and angle."""

    x: Any
    y: Any
    w: Any
    h: Any
    angle: Any


class Pair(NamedTuple):
    """Deviations of both boxes, the turn from b to a, and the offset from b to a in the frames of both."""

    along_a: Any
    across_a: Any
    along_b: Any
    across_b: Any
    cos: Any
    sin: Any
    cos_b: Any
    sin_b: Any
    u_a: Any
    v_a: Any
    u_b: Any
    v_b: Any


@triton.jit
def _half_turns(angle):
    """Half turns next to an angle: what it is off them is at most a quarter turn."""
    return tl.floor(angle * _PER_PI + 0.5)


@triton.jit
def direction(angle):
    """Cosine and sine of an angle, up to a common sign, to 2e-7 in float32: what half a turn does not change."""
    half_turns = _half_turns(angle)
    x = ((angle - half_turns * _PI_HIGH) - half_turns * _PI_MIDDLE) - half_turns * _PI_LOW
    x = tl.where(tl.abs(x) > 2, 0.0, x)  # of numbers that are further apart than half a turn
    square = x * x
    TERMS: tl.constexpr = 11 if angle.dtype == tl.float64 else 7
    cos = 1.0 - square * 0.0
    sin = cos
    for i in tl.static_range(TERMS):
        cos = 1 - square * cos * (1.0 / ((2 * (TERMS - i) - 1) * (2 * (TERMS - i))))
        sin = 1 - square * sin * (1.0 / ((2 * (TERMS - i)) * (2 * (TERMS - i) + 1)))
    return cos, x * sin


@triton.jit
def heading(angle):
    """Cosine and sine of an angle."""
    cos, sin = direction(angle)
    half = _half_turns(angle) / 2
    is_odd = half != tl.floor(half)
    return tl.where(is_odd, -cos, cos), tl.where(is_odd, -sin, sin)


@triton.jit
def oriented_box(x, y, left, top, right, bottom, angle):
    """Boxes, in cells, whose sides are so far from points (x, y) along their axes; and the offset of their centres."""
    cos, sin = heading(angle)
    along, across = (right - left) / 2, (bottom - top) / 2
    dx, dy = along * cos - across * sin, along * sin + across * cos
    return Oriented(x + dx, y + dy, left + right, top + bottom, angle), dx, dy


@triton.jit
def one_less_exp(x):
    """1 - exp(-x) for x >= 0, with the relative error of exp however small x is."""
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    series = 1.0 - x * 0.0
    for i in tl.static_range(TERMS):
        series = 1 - x * series * (1.0 / (TERMS + 1 - i))
    return tl.where(x < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def _deviation(side, FLOOR: tl.constexpr):
    return tl.sqrt(side * side / 12 + FLOOR)


@triton.jit
def _pair(a, b, FLOOR: tl.constexpr):
    cos, sin = direction(a.angle - b.angle)
    cos_b, sin_b = direction(b.angle)
    dx, dy = a.x - b.x, a.y - b.y
    u_b, v_b = dx * cos_b + dy * sin_b, dy * cos_b - dx * sin_b
    u_a, v_a = u_b * cos + v_b * sin, v_b * cos - u_b * sin
    return Pair(
        _deviation(a.w, FLOOR), _deviation(a.h, FLOOR), _deviation(b.w, FLOOR), _deviation(b.h, FLOOR),
        cos, sin, cos_b, sin_b, u_a, v_a, u_b, v_b,
    )  # fmt: skip


@triton.jit
def _differences(x):
    """Of products of deviations: of either box, and of one along and the other across it or along it."""
    of_boxes = x.along_a * x.across_a - x.along_b * x.across_b
    crossed = x.along_a * x.across_b - x.across_a * x.along_b
    return of_boxes, crossed, x.along_a * x.along_b - x.across_a * x.across_b


@triton.jit
def _measures(x):
    """Excess, areas, and the squared offset by the sum of covariances times its determinant."""
    of_boxes, crossed, aligned = _differences(x)
    crossed, aligned = crossed * x.cos, aligned * x.sin
    excess = of_boxes * of_boxes + crossed * crossed + aligned * aligned
    areas = 4 * x.along_a * x.across_a * x.along_b * x.across_b
    u_a, v_a, u_b, v_b = x.across_a * x.u_a, x.along_a * x.v_a, x.across_b * x.u_b, x.along_b * x.v_b
    return excess, areas, u_a * u_a + v_a * v_a + (u_b * u_b + v_b * v_b)


@triton.jit
def _distance(excess, areas, apart, EPS: tl.constexpr):
    """Bhattacharyya distance, not yet between its bounds."""
    over = (excess - EPS) / (areas + EPS) + EPS
    # Less than nothing is over only where both areas are next to nothing beside eps.
    ratio = (excess + areas) / (areas + EPS) + EPS
    size = log1p(tl.where(over < 0, -over / ratio, over))
    return apart / (excess + areas + EPS) / 4 + tl.where(over < 0, -size, size) / 2


@triton.jit
def _hellinger(distance, EPS: tl.constexpr):
    return tl.sqrt(one_less_exp(distance) + EPS)


@triton.jit
def _bounded(distance, EPS: tl.constexpr):
    """Between its bounds. Not by a minimum and a maximum, which may hide that it is no number."""
    return tl.where(distance < EPS, EPS, tl.where(distance > 100, 100.0, distance)).to(distance.dtype)


@triton.jit
def prob_overlap(a, b, EPS: tl.constexpr, FLOOR: tl.constexpr):
    """ProbIoU of boxes; ``EPS`` and ``FLOOR`` where ``reference.prob_iou`` has them."""
    excess, areas, apart = _measures(_pair(a, b, FLOOR))
    return 1 - _hellinger(_bounded(_distance(excess, areas, apart, EPS), EPS), EPS)


@triton.jit
def _by_side(d_deviation, side, deviation):
    return tl.where(deviation == 0, 0.0, d_deviation * side / tl.where(deviation == 0, 1.0, 12 * deviation))


@triton.jit
def prob_overlap_derivative(a, b, EPS: tl.constexpr, FLOOR: tl.constexpr):
    """Derivative of ``prob_overlap`` by a. It is symmetric, so the derivative by b is that of (b, a)."""
    x = _pair(a, b, FLOOR)
    excess, areas, apart = _measures(x)
    distance = _distance(excess, areas, apart, EPS)
    d_distance = -tl.exp(-distance) / (2 * _hellinger(_bounded(distance, EPS), EPS))
    d_distance = tl.where((distance < EPS) | (distance > 100), 0.0, d_distance)

    per_determinant, per_areas = 1 / (excess + areas + EPS), 1 / (areas + EPS)
    d_apart = d_distance * per_determinant / 4
    d_determinant = -d_apart * (apart * per_determinant)
    d_shape = d_distance / (2 * ((excess + areas) * per_areas + EPS)) * per_areas
    d_excess = 2 * (d_determinant + d_shape)
    d_areas = 4 * (d_determinant - d_shape * ((excess - EPS) * per_areas)) * x.along_b * x.across_b
    d_apart = 2 * d_apart

    of_boxes, crossed, aligned = _differences(x)
    crossed, aligned = crossed * (x.cos * x.cos), aligned * (x.sin * x.sin)
    d_along = d_excess * (of_boxes * x.across_a + crossed * x.across_b + aligned * x.along_b)
    d_across = d_excess * (of_boxes * x.along_a - crossed * x.along_b - aligned * x.across_b)
    d_along += d_areas * x.across_a + d_apart * x.along_a * (x.v_a * x.v_a)
    d_across += d_areas * x.along_a + d_apart * x.across_a * (x.u_a * x.u_a)
    longer_a = (x.along_a - x.across_a) * (x.along_a + x.across_a)
    longer_b = (x.along_b - x.across_b) * (x.along_b + x.across_b)
    d_turn = longer_a * (d_excess * x.sin * x.cos * longer_b - d_apart * x.u_a * x.v_a)

    pull_u, pull_v = x.across_a * x.across_a * x.u_a, x.along_a * x.along_a * x.v_a
    turned_u = x.across_b * x.across_b * x.u_b + pull_u * x.cos - pull_v * x.sin
    turned_v = x.along_b * x.along_b * x.v_b + pull_u * x.sin + pull_v * x.cos
    d_x = d_apart * (turned_u * x.cos_b - turned_v * x.sin_b)
    d_y = d_apart * (turned_u * x.sin_b + turned_v * x.cos_b)
    return Oriented(d_x, d_y, _by_side(d_along, a.w, x.along_a), _by_side(d_across, a.h, x.across_a), d_turn)
