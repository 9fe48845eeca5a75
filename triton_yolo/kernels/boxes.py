"""Pure tile functions: the IoU family with its derivative, distributions over bins, sigmoid, cross entropy. No loads or stores.

They compute in the type of their arguments, float32 or float64. A formula that a fused multiply-add may not change is written
with plain products (every kernel is launched with contraction off); ``tl.fma`` stands where it is wanted.
"""

import math

import triton
import triton.language as tl

from .launch import INTERPRETED

_IS_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
_PI: tl.constexpr = tl.constexpr(math.pi)
_FOUR_BY_PI2: tl.constexpr = tl.constexpr(4 / math.pi**2)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Cast to a type to store, rounding to the nearest; the interpreter's own cast to bfloat16 truncates."""
    if _IS_INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(tl.abs(x) < float("inf"), (bits & -0x10000).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A number among a kernel's arguments, annotated ``tl.float64`` there: Triton passes float32 otherwise."""
    return tl.full((), x, DTYPE)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1 with a relative error of 2e-7 in float32: the log of 1 + 1e-9 would lose the 1e-9."""
    if e.dtype == tl.float64:
        result = log_product(e)
    else:
        p = tl.fma(e, 0.005232690833508968, -0.029505228623747826)
        p = tl.fma(e, p, 0.07822594791650772)
        p = tl.fma(e, p, -0.13663245737552643)
        p = tl.fma(e, p, 0.19106008112430573)
        p = tl.fma(e, p, -0.2484298199415207)
        p = tl.fma(e, p, 0.3331909775733948)
        p = tl.fma(e, p, -0.4999949336051941)
        result = e * tl.fma(e, p, 0.9999999403953552)
    return result


@triton.jit
def log_product(excess):
    """log(1 + excess) for any excess >= 0, for instance of a product over 1. Give the rounding of the sum back to it."""
    u = 1 + excess
    return tl.log(u) + (excess - (u - 1)) / u


@triton.jit
def log1p(e):
    """log(1 + e) for any e >= 0 with the relative error of ``_log1p``, also where a fast log has but an absolute one."""
    return tl.where(e <= 1, _log1p(e), tl.log(1 + e))


@triton.jit
def halves(x):
    """Neighbours [n / 2] among values [n]."""
    return tl.split(tl.reshape(x, (x.numel // 2, 2)))


@triton.jit
def log_rest(p, rest):
    """log(rest) for rest = 1 - p, 0 <= p <= 1, both known: with the relative error of ``_log1p`` however small p is."""
    return tl.where(p <= 0.5, -_log1p(p / rest), tl.log(rest))


@triton.jit
def log_not(p):
    return log_rest(p, 1 - p)


@triton.jit
def split_sigmoid(x):
    """Whether x is positive, and exp(-|x|)."""
    # By its bits: of half-precision numbers LLVM would compare two at once, and take them apart again.
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    return bits > 0, tl.exp2(tl.abs(x) * scalar(-_LOG2E, x.dtype))


@triton.jit
def split_softplus(x):
    """Two numbers, so that softplus(x) = first + log(1 + second).

    The first is NaN where x is not finite: x / 2 + |x / 2| for max(x, 0) makes that of -inf, and 0 * x of inf.
    """
    half = x * 0.5
    return half + tl.abs(half) + x * 0.0, split_sigmoid(x)[1]


@triton.jit
def sigmoid_of(is_up, e, DTYPE: tl.constexpr):
    """sigmoid(x) from what ``split_sigmoid`` made of x, as exact as a type to store needs."""
    over = tl.where(is_up, 1.0, e).to(e.dtype)
    if e.dtype == tl.float64:
        result = over / (1 + e)
    else:
        root = tl.rsqrt(1 + e)  # its square is right to 4e-7; a division takes three times the instructions
        inverse = root * root
        if tl.float32 == DTYPE:
            inverse = tl.fma(inverse, tl.fma(-inverse, 1 + e, 1.0), inverse)
        result = over * inverse
    return result


@triton.jit
def softplus(x):
    most, e = split_softplus(x)
    return most + _log1p(e)


@triton.jit
def cross_entropy_with_logits(x, target):
    most, e = split_softplus(x)
    return (most - x * target) + _log1p(e)  # in this order a small loss of a large x keeps its digits


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for x >= 0; square root and products for 0.5 and small whole exponents."""
    if EXPONENT == 0:
        result = tl.full(x.shape, 1, x.dtype)
    elif EXPONENT == 0.5:
        result = tl.sqrt(x)
    elif (EXPONENT == 1) or (EXPONENT == 2) or (EXPONENT == 3):
        result = x
        if EXPONENT >= 2:
            result = result * x
        if EXPONENT == 3:
            result = result * x
    elif EXPONENT == 6:
        cube = x * x * x
        result = cube * cube
    else:
        result = tl.where(x == 0, 0.0, tl.exp2(EXPONENT * tl.log2(x)))
    return result


@triton.jit
def expectation(logits, bins, R: tl.constexpr):
    """Probabilities [R, n] and expected bin [n] of logits [R, n]; with one bin the logit is the value.

    Rows past R must hold -inf.
    """
    if R == 1:
        probs = tl.full(logits.shape, 1, logits.dtype)
        value = tl.sum(logits, 0)
    else:
        e = tl.exp(logits - tl.max(logits, 0)[None, :])
        total = tl.sum(e, 0)
        value = tl.sum(e * bins, 0) / total
        probs = e / total[None, :]
    return probs, value


@triton.jit
def arctangent(t):
    """atan(t) for 0 <= t <= 1, to 2e-7 in float32 and to rounding in float64."""
    if t.dtype == tl.float64:
        # atan(t) = 2 atan(t / (1 + sqrt(1 + t^2))); after three halvings t < 0.1 and the series is short.
        t = t / (1 + tl.sqrt(1 + t * t))
        t = t / (1 + tl.sqrt(1 + t * t))
        t = t / (1 + tl.sqrt(1 + t * t))
        s = t * t
        p = -1 / 15 + s / 17
        p = 1 / 13 + s * p
        p = -1 / 11 + s * p
        p = 1 / 9 + s * p
        p = -1 / 7 + s * p
        p = 1 / 5 + s * p
        p = -1 / 3 + s * p
        result = 8 * t * (1 + s * p)
    else:
        s = t * t
        p = tl.fma(s, 0.0028498878236860037, -0.016068624332547188)
        p = tl.fma(s, p, 0.04269151762127876)
        p = tl.fma(s, p, -0.07504294812679291)
        p = tl.fma(s, p, 0.10640934109687805)
        p = tl.fma(s, p, -0.14203645288944244)
        p = tl.fma(s, p, 0.1999261975288391)
        p = tl.fma(s, p, -0.3333307206630707)
        result = t * tl.fma(s, p, 1.0)
    return result


@triton.jit
def shape_angle(wa, ha, wb, hb, IS_PROPER: tl.constexpr = False):
    """atan(wb / hb) - atan(wa / ha) as one angle between (ha, wa) and (hb, wb), whatever the signs; 0 if one is (0, 0).

    Of boxes that are ``IS_PROPER``, widths not negative and heights positive, it takes fewer instructions.
    """
    cross, dot = wb * ha - wa * hb, ha * hb + wa * wb
    if not IS_PROPER:
        flip = (ha < 0) != (hb < 0)
        cross, dot = tl.where(flip, -cross, cross), tl.where(flip, -dot, dot)
    rise, run = tl.abs(cross), tl.abs(dot)
    is_steep = rise > run
    longer = tl.where(is_steep, rise, run)
    if not IS_PROPER:
        longer = tl.where(longer == 0, 1.0, longer)
    angle = arctangent(tl.where(is_steep, run, rise) / longer)
    angle = tl.where(is_steep, _PI / 2 - angle, angle)
    if not IS_PROPER:
        angle = tl.where(dot < 0, _PI - angle, angle)
    return tl.where(cross < 0, -angle, angle)


@triton.jit
def _in_range(a1, a2, b1, b2):
    """Ends of a and b on one axis by a scale at which areas are numbers, and the scale, which GIoU does not depend on."""
    scale = tl.where(tl.maximum(a2, b2) - tl.minimum(a1, b1) > 2.0**63, 2.0**-66, 1.0).to(a1.dtype)
    return a1 * scale, a2 * scale, b1 * scale, b2 * scale, scale


@triton.jit
def overlap(
    ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr, EPS: tl.constexpr, IS_PROPER: tl.constexpr = False
):  # fmt: skip
    """Overlap of boxes a and b of a kind of the IoU family; ``EPS`` where ``reference.bbox_iou`` has it.

    ``IS_PROPER``: no side is negative.
    """
    if KIND == "giou":
        ax1, ax2, bx1, bx2, _ = _in_range(ax1, ax2, bx1, bx2)
        ay1, ay2, by1, by2, _ = _in_range(ay1, ay2, by1, by2)
    wa, ha, wb, hb = ax2 - ax1, ay2 - ay1 + EPS, bx2 - bx1, by2 - by1 + EPS
    inter_w = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0)
    inter_h = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0)
    inter = inter_w * inter_h
    union = wa * ha + wb * hb - inter + EPS
    result = inter / union
    if KIND != "iou":
        enclosing_w = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
        enclosing_h = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
        if KIND == "giou":
            enclosing_area = enclosing_w * (enclosing_h + 2 * EPS) + EPS
            result = result - (enclosing_area - union) / enclosing_area
        else:
            iou = result
            diagonal2 = enclosing_w * enclosing_w + enclosing_h * enclosing_h + EPS
            dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
            result = iou - (dx * dx + dy * dy) / diagonal2
            if KIND == "ciou":
                angle = shape_angle(wa, ha, wb, hb, IS_PROPER)
                v = _FOUR_BY_PI2 * (angle * angle)
                result = result - v / (1 - iou + v + EPS) * v
    return result


@triton.jit
def overlap_derivative(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr, EPS: tl.constexpr):
    """Derivative of ``overlap`` by the four corners of a.

    Where two sides coincide, each gets half of the derivative of their minimum or maximum, and where boxes touch, the overlap
    gets half of that of its maximum with 0. CIoU's trade-off weight is a constant. Every kind is symmetric, so the derivative
    by b is that of (b, a).
    """
    if KIND == "giou":
        ax1, ax2, bx1, bx2, x_scale = _in_range(ax1, ax2, bx1, bx2)
        ay1, ay2, by1, by2, y_scale = _in_range(ay1, ay2, by1, by2)
    wa, ha, wb, hb = ax2 - ax1, ay2 - ay1 + EPS, bx2 - bx1, by2 - by1 + EPS
    overlap_w = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    overlap_h = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    inter_w, inter_h = tl.maximum(overlap_w, 0), tl.maximum(overlap_h, 0)
    inter = inter_w * inter_h
    union = wa * ha + wb * hb - inter + EPS

    # Shares of a's sides in the intersection and, the other way round, in the enclosing box.
    x1_inner = tl.where(ax1 == bx1, 0.5, tl.where(ax1 > bx1, 1.0, 0.0)).to(union.dtype)
    y1_inner = tl.where(ay1 == by1, 0.5, tl.where(ay1 > by1, 1.0, 0.0)).to(union.dtype)
    x2_inner = tl.where(ax2 == bx2, 0.5, tl.where(ax2 < bx2, 1.0, 0.0)).to(union.dtype)
    y2_inner = tl.where(ay2 == by2, 0.5, tl.where(ay2 < by2, 1.0, 0.0)).to(union.dtype)

    per_union = 1 / union  # whose square may not be a number of the type, nor that of other areas
    d_union = -(inter * per_union) * per_union
    enclosing_w = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    enclosing_h = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    if KIND == "giou":
        enclosing_area = enclosing_w * (enclosing_h + 2 * EPS) + EPS
        per_area = 1 / enclosing_area
        d_union = d_union + per_area
    d_inter = per_union - d_union
    d_wa, d_ha = d_union * ha, d_union * wa
    d_overlap_w, d_overlap_h = d_inter * inter_h, d_inter * inter_w
    d_overlap_w = tl.where(overlap_w > 0, d_overlap_w, tl.where(overlap_w == 0, d_overlap_w / 2, 0.0))
    d_overlap_h = tl.where(overlap_h > 0, d_overlap_h, tl.where(overlap_h == 0, d_overlap_h / 2, 0.0))
    if KIND == "ciou":
        angle = shape_angle(wa, ha, wb, hb)
        v = _FOUR_BY_PI2 * (angle * angle)
        d_angle = v / (1 - inter / union + v + EPS) * (2 * _FOUR_BY_PI2) * angle
        turn = d_angle / (wa * wa + ha * ha)
        d_wa, d_ha = d_wa + turn * ha, d_ha - turn * wa

    d_x1, d_y1 = -d_wa - d_overlap_w * x1_inner, -d_ha - d_overlap_h * y1_inner
    d_x2, d_y2 = d_wa + d_overlap_w * x2_inner, d_ha + d_overlap_h * y2_inner
    if KIND != "iou":
        if KIND == "giou":
            d_area = -(union * per_area) * per_area
            d_enclosing_w, d_enclosing_h = d_area * (enclosing_h + 2 * EPS), d_area * enclosing_w
        else:
            diagonal2 = enclosing_w * enclosing_w + enclosing_h * enclosing_h + EPS
            dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
            per_diagonal2 = 1 / diagonal2
            dx_share, dy_share = dx * per_diagonal2, dy * per_diagonal2
            d_diagonal2 = (dx * dx_share + dy * dy_share) * per_diagonal2
            d_enclosing_w, d_enclosing_h = 2 * enclosing_w * d_diagonal2, 2 * enclosing_h * d_diagonal2
            d_x1, d_x2, d_y1, d_y2 = d_x1 - dx_share, d_x2 - dx_share, d_y1 - dy_share, d_y2 - dy_share
        d_x1, d_y1 = d_x1 - d_enclosing_w * (1 - x1_inner), d_y1 - d_enclosing_h * (1 - y1_inner)
        d_x2, d_y2 = d_x2 + d_enclosing_w * (1 - x2_inner), d_y2 + d_enclosing_h * (1 - y2_inner)
    if KIND == "giou":
        d_x1, d_y1, d_x2, d_y2 = d_x1 * x_scale, d_y1 * y_scale, d_x2 * x_scale, d_y2 * y_scale
    return d_x1, d_y1, d_x2, d_y2


@triton.jit
def box_rows(x1, y1, x2, y2):
    """Four coordinates [n] as rows [n, 4]."""
    return tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (x1.shape[0], 4))


@triton.jit
def box_columns(boxes):
    """Rows [n, 4] as four coordinates [n]."""
    xs, ys = tl.split(tl.reshape(boxes, (boxes.shape[0], 2, 2)))
    x1, x2 = tl.split(xs)
    y1, y2 = tl.split(ys)
    return x1, y1, x2, y2
