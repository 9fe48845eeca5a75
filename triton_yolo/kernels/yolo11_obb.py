"""YOLO11's loss of oriented boxes for a given assignment, at its positive anchors; the rest is as of axis-aligned boxes."""

import triton
import triton.language as tl

from .._signatures import FLOOR
from .boxes import rounded, scalar
from .classes import loss_scale
from .decode import load_angles
from .grid import cell_centres
from .oriented import Oriented, direction, heading, oriented_box, prob_overlap, prob_overlap_derivative
from .positives import (
    Sides,
    load_labels,
    load_positives,
    of_side,
    one_side,
    side_losses,
    side_softmax,
    write_bin_grads,
    write_label_grad,
)
from .rows import load_oriented_rows

_FLOOR: tl.constexpr = tl.constexpr(FLOOR)


@triton.jit
def _true_oriented(at, matched, stride, DTYPE: tl.constexpr):
    """Boxes [s, 1] of the rows, centres and sides in cells."""
    box = load_oriented_rows(matched.box_ptr, 5, 1, at.row, at.mask, DTYPE)
    return Oriented(box.x / stride, box.y / stride, box.w / stride, box.h / stride, box.angle)


@triton.jit
def _target_sides(side, x, y, gt):
    """Distances [s, 4] of points to the sides of true boxes, along the axes of these."""
    cos, sin = heading(gt.angle)
    dx, dy = x - gt.x, y - gt.y
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return of_side(side, gt.w / 2 + along, gt.h / 2 + across, gt.w / 2 - along, gt.h / 2 - across)


@triton.jit
def _roundness(gt):
    """How much the angle of a true box counts."""
    elongation = tl.log((gt.w + 1e-9) / (gt.h + 1e-9)) / 3
    return tl.exp(-elongation * elongation)


@triton.jit
def _oriented_gradient(box, gt, offset_x, offset_y):
    """Derivative of the overlap by a box's distances (left, top, right, bottom) and its angle."""
    d = prob_overlap_derivative(box, gt, 1e-7, _FLOOR)
    cos, sin = heading(box.angle)
    along, across = (d.x * cos + d.y * sin) / 2, (d.y * cos - d.x * sin) / 2
    d_angle = d.angle + offset_x * d.y - offset_y * d.x
    return d.w - along, d.h - across, d.w + along, d.h + across, d_angle


@triton.jit(do_not_specialize=["count"])
def _yolo11_obb_positives_kernel(
    partial_ptr, grads, upstream, preds, matched, claims, weights_ptr, grid, height: tl.float64, width: tl.float64,
    box_gain: tl.float64, cls_gain: tl.float64, dfl_gain: tl.float64, angle_gain: tl.float64, count,
    STRIDES: tl.constexpr, R: tl.constexpr, CLAIMS: tl.constexpr, DTYPE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The same as ``_yolo11_positives_kernel`` of oriented boxes, with the angle's sums behind the others."""
    at = load_positives(matched, claims, count, grid.A, CLAIMS, DTYPE, SLOTS)
    box, hits, dfl, angle = tl.zeros((), DTYPE), tl.zeros((), DTYPE), tl.zeros((), DTYPE), tl.zeros((), DTYPE)
    if tl.max(at.mask.to(tl.int32)) > 0:
        x, y, stride = cell_centres(at.anchor, grid, STRIDES, DTYPE)
        gt = _true_oriented(at, matched, stride, DTYPE)
        side = tl.arange(0, 4)[None, :]
        top, norm, distance = side_softmax(preds.dist, at, side, R, DTYPE)
        share = stride / tl.where(side % 2 == 0, scalar(width, DTYPE), scalar(height, DTYPE))
        sides = Sides(distance, _target_sides(side, x, y, gt), share, top, norm)
        pred, offset_x, offset_y = oriented_box(
            x, y, one_side(side, distance, 0), one_side(side, distance, 1), one_side(side, distance, 2),
            one_side(side, distance, 3), load_angles(preds.angle, at.image, at.anchor, at.mask, DTYPE),
        )  # fmt: skip
        cos, sin = direction(pred.angle - gt.angle)
        double_sin, roundness = 2 * sin * cos, _roundness(gt)
        label, logit, weight = load_labels(at, matched, preds.scores, weights_ptr, DTYPE)
        if partial_ptr is not None:
            box = tl.sum(tl.where(at.mask, (1 - prob_overlap(pred, gt, 1e-7, _FLOOR)) * at.score, 0.0))
            hits = tl.sum(tl.where(at.mask, logit * weight * at.score, 0.0))
            dfl = tl.sum(tl.where(at.mask, side_losses(preds.dist, at, side, sides, R, DTYPE) * (at.score / 4), 0.0))
            angle = tl.sum(tl.where(at.mask, double_sin * double_sin * roundness * at.score, 0.0))
        if grads.dist is not None:
            scale = loss_scale(upstream, DTYPE)
            left, top, right, bottom, d_angle = _oriented_gradient(pred, gt, offset_x, offset_y)
            box_weight, dfl_weight = scalar(box_gain, DTYPE) * at.score * scale, scalar(dfl_gain, DTYPE) / 4 * at.score * scale
            d_distance = of_side(side, left, top, right, bottom) * -box_weight
            write_bin_grads(grads.dist, preds.dist, at, side, sides, d_distance, dfl_weight, R, DTYPE)
            d_double = 4 * double_sin * (cos * cos - sin * sin) * roundness * (scalar(angle_gain, DTYPE) * at.score * scale)
            offs = at.image * grads.angle.image + at.anchor.to(tl.int64) * grads.angle.anchor
            d_angle = rounded(d_double - d_angle * box_weight, grads.angle.ptr.dtype.element_ty)
            tl.store(grads.angle.ptr + offs, d_angle, mask=at.mask)
            write_label_grad(grads.scores, at, label, logit, weight, scalar(cls_gain, DTYPE) * scale)
    if partial_ptr is not None:
        ptr, programs = partial_ptr + tl.program_id(0), tl.num_programs(0)
        tl.store(ptr, box)
        tl.store(ptr + programs, hits)
        tl.store(ptr + 2 * programs, dfl)
        tl.store(ptr + 3 * programs, angle)
