"""YOLO11's loss for a given assignment, forward and backward, with the one-hot target implied.

A dense pass, in ``classes``, takes every class logit for background; what belongs to positive anchors is worked out by slots,
few of which are empty, and put right afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import overlap, overlap_derivative, scalar
from .classes import loss_scale
from .fill import fill
from .grid import cell_centres, sized
from .launch import INTERPRETED
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
from .reduce import total
from .rows import Box, load_row_boxes

FILL_BLOCK = 2**18 if INTERPRETED else 4096


class Sizes(NamedTuple):
    """Numbers of elements of the gradients."""

    dist: int
    angle: int
    scores: int


@triton.jit
def _true_boxes(at, matched, stride, DTYPE: tl.constexpr):
    """Boxes [s, 1] of the rows in cells."""
    box = load_row_boxes(matched.box_ptr, 4, 1, at.row, at.mask, DTYPE)
    return Box(box.x1 / stride, box.y1 / stride, box.x2 / stride, box.y2 / stride)


@triton.jit(do_not_specialize=["count"])
def _yolo11_positives_kernel(
    partial_ptr, grads, upstream, preds, matched, claims, weights_ptr, grid, height: tl.float64, width: tl.float64,
    box_gain: tl.float64, cls_gain: tl.float64, dfl_gain: tl.float64, count,
    STRIDES: tl.constexpr, R: tl.constexpr, CLAIMS: tl.constexpr, DTYPE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program reads the box logits and the label's class logit of the positives in its SLOTS.

    It writes its own sums to ``partial`` (3, programs): box, what the dense pass has too much, DFL. Of the gradients it writes
    what the dense pass and the fill left to it.
    """
    grid = sized(grid)
    at = load_positives(matched, claims, count, grid.A, CLAIMS, DTYPE, SLOTS)
    box, hits, dfl = tl.zeros((), DTYPE), tl.zeros((), DTYPE), tl.zeros((), DTYPE)
    if tl.max(at.mask.to(tl.int32)) > 0:
        x, y, stride = cell_centres(at.anchor, grid, STRIDES, DTYPE)
        gt = _true_boxes(at, matched, stride, DTYPE)
        side = tl.arange(0, 4)[None, :]
        top, norm, distance = side_softmax(preds.dist, at, side, R, DTYPE)
        target = of_side(side, x - gt.x1, y - gt.y1, gt.x2 - x, gt.y2 - y)
        share = stride / tl.where(side % 2 == 0, scalar(width, DTYPE), scalar(height, DTYPE))
        sides = Sides(distance, target, share, top, norm)
        x1, y1 = x - one_side(side, distance, 0), y - one_side(side, distance, 1)
        x2, y2 = x + one_side(side, distance, 2), y + one_side(side, distance, 3)
        label, logit, weight = load_labels(at, matched, preds.scores, weights_ptr, DTYPE)
        if partial_ptr is not None:
            ciou = overlap(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            box = tl.sum(tl.where(at.mask, (1 - ciou) * at.score, 0.0))
            hits = tl.sum(tl.where(at.mask, logit * weight * at.score, 0.0))
            dfl = tl.sum(tl.where(at.mask, side_losses(preds.dist, at, side, sides, R, DTYPE) * (at.score / 4), 0.0))
        if grads.dist is not None:
            scale = loss_scale(upstream, DTYPE)
            d_x1, d_y1, d_x2, d_y2 = overlap_derivative(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            d_distance = of_side(side, d_x1, d_y1, -d_x2, -d_y2) * (scalar(box_gain, DTYPE) * at.score * scale)
            dfl_weight = scalar(dfl_gain, DTYPE) / 4 * at.score * scale
            write_bin_grads(grads.dist, preds.dist, at, side, sides, d_distance, dfl_weight, R, DTYPE)
            write_label_grad(grads.scores, at, label, logit, weight, scalar(cls_gain, DTYPE) * scale)
    if partial_ptr is not None:
        ptr, programs = partial_ptr + tl.program_id(0), tl.num_programs(0)
        tl.store(ptr, box)
        tl.store(ptr + programs, hits)
        tl.store(ptr + 2 * programs, dfl)


class Loss(NamedTuple):
    """Loss (), its three terms (), four of oriented boxes, and the normaliser for backward (2,)."""

    ptr: Any
    terms: Any
    held_ptr: Any


@triton.jit
def _fill_kernel(out_ptr, upstream, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Programs fill a gradient with that of background: 0, or NaN where no number stands for the loss."""
    scale = loss_scale(upstream, DTYPE)
    fill(out_ptr, tl.where(scale == scale, 0.0, scale), count, tl.program_id(0), tl.num_programs(0), BLOCK)


@triton.jit
def _weighted(gain, sum_):
    """A term of the loss. A gain of 0 turns it off, also where the sum overflows."""
    gain = scalar(gain, sum_.dtype)
    return tl.where(gain > 0, gain * sum_, 0.0)


@triton.jit(do_not_specialize=["dense", "programs"])
def _yolo11_total_kernel(
    loss, grads, counts, dense_ptr, partial_ptr, normaliser_ptr, box_gain: tl.float64, cls_gain: tl.float64,
    dfl_gain: tl.float64, angle_gain: tl.float64, dense, programs, HAS_ANGLE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up the partial sums and writes the loss and its terms.

    Into ``held`` it writes the normaliser for the backward pass: NaN if the sum over the class logits is. Where the normaliser
    is NaN already, all programs together make every gradient NaN.
    """
    normaliser = tl.load(normaliser_ptr).to(DTYPE)
    if grads.dist is not None:
        num_broken = (normaliser != normaliser).to(tl.int64)
        fill(grads.dist.ptr, float("nan"), num_broken * counts.dist, tl.program_id(0), tl.num_programs(0), BLOCK)
        if HAS_ANGLE:
            fill(grads.angle.ptr, float("nan"), num_broken * counts.angle, tl.program_id(0), tl.num_programs(0), BLOCK)
        fill(grads.scores.ptr, float("nan"), num_broken * counts.scores, tl.program_id(0), tl.num_programs(0), BLOCK)
    if tl.program_id(0) == 0:
        cls = total(dense_ptr, dense, DTYPE, BLOCK)
        is_broken = cls != cls
        normaliser = tl.where(is_broken, cls, normaliser)
        batch_size = tl.where(is_broken, cls, tl.load(normaliser_ptr + 1).to(DTYPE))
        tl.store(loss.held_ptr, normaliser)
        tl.store(loss.held_ptr + 1, batch_size)
        # A sum of finite numbers that overflows is not NaN.
        cls = tl.where(cls < float("inf"), cls - total(partial_ptr + programs, programs, DTYPE, BLOCK), cls)
        box_term = _weighted(box_gain, total(partial_ptr, programs, DTYPE, BLOCK)) / normaliser
        cls_term = _weighted(cls_gain, cls) / normaliser
        dfl_term = _weighted(dfl_gain, total(partial_ptr + 2 * programs, programs, DTYPE, BLOCK)) / normaliser
        tl.store(loss.terms[0], box_term)
        tl.store(loss.terms[1], cls_term)
        tl.store(loss.terms[2], dfl_term)
        terms = box_term + cls_term + dfl_term
        if HAS_ANGLE:
            angle_term = _weighted(angle_gain, total(partial_ptr + 3 * programs, programs, DTYPE, BLOCK)) / normaliser
            tl.store(loss.terms[3], angle_term)
            terms += angle_term
        tl.store(loss.ptr, batch_size * terms)
