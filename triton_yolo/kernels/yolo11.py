"""YOLO11's loss for a given assignment, forward and backward, with the one-hot target implied.

A dense pass, in ``classes``, takes every class logit for background; what belongs to positive anchors is worked out by slots,
few of which are empty, and put right afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import exponentials, overlap, overlap_derivative, rounded, scalar, sigmoid
from .classes import loss_scale
from .grid import cell_centres
from .launch import INTERPRETED
from .reduce import total
from .rows import Box, load_row_boxes


def slot_sizes(num_slots: int, reg_max: int) -> dict[str, int]:
    """Slots a program, and warps: a thread has all bins of one side of one slot."""
    if INTERPRETED:
        return {"SLOTS": min(triton.next_power_of_2(max(num_slots, 1)), max(1, 2**16 // reg_max)), "num_warps": 4}
    return {"SLOTS": 32, "num_warps": 4}


class Matched(NamedTuple):
    """An assignment: row and target score (B, A) of every anchor; label (N,) and box (N, 4) of every row."""

    row_ptr: Any
    score_ptr: Any
    label_ptr: Any
    box_ptr: Any


class Gains(NamedTuple):
    """Weights of the terms."""

    box: Any
    cls: Any
    dfl: Any


class Gradients(NamedTuple):
    """Gradients of distances (B, A, 4R) and class logits (B, A, C), ``Tensor3``."""

    dist: Any
    scores: Any


class Positives(NamedTuple):
    """Slots [s, 1]: whether there is a positive anchor in each; its image, number, row and target score."""

    mask: Any
    image: Any
    anchor: Any
    row: Any
    score: Any


@triton.jit
def _matched_anchors(slot, matched, count, A, DTYPE: tl.constexpr):
    """Slots are the anchors of all images."""
    row = tl.load(matched.row_ptr + slot, mask=slot < count, other=-1)
    mask = row >= 0
    slot = tl.where(mask, slot, 0)
    image = slot // A
    score = tl.load(matched.score_ptr + slot, mask=mask, other=0.0).to(DTYPE)
    return Positives(mask, image, slot - image * A, row, score)


class Sides(NamedTuple):
    """Of sides [s, 4] of positives: number, expected distance and target in cells, length of a cell in shares of the image."""

    side: Any
    distance: Any
    target: Any
    share: Any


@triton.jit
def _bin_weights(target, bins, R: tl.constexpr):
    """Weights [s, 4, R] of the two bins around distances [s, 4], 0 for the others: they fall off linearly to the next bin."""
    last = tl.full(target.shape, R - 1 - 0.01, target.dtype)  # a bare constant would be rounded to float32
    target = tl.minimum(tl.maximum(target, 0.0), last)
    return tl.maximum(1 - tl.abs(bins - target[:, :, None]), 0.0)


@triton.jit
def _of_side(side, left, top, right, bottom):
    """The values [s, 4] of all sides, from those [s, 1] of each."""
    return tl.where(side == 0, left, tl.where(side == 1, top, tl.where(side == 2, right, bottom)))


@triton.jit
def _one_side(side, values, N: tl.constexpr):
    """The values [s, 1] of one side."""
    return tl.sum(tl.where(side == N, values, 0.0), 1)[:, None]


@triton.jit
def _channels(x, at, R: tl.constexpr, RP: tl.constexpr):
    """Offsets [s, 4, RP] of the channels of the box logits of positives, and which of them there are."""
    # With no contiguity known a load gives the first dimension to the lanes of a warp, and its last to one thread.
    side, bins = tl.arange(0, 4)[None, :, None], tl.arange(0, RP)[None, None, :]
    offs = at.image * x.image + at.anchor.to(tl.int64) * x.anchor
    return offs[:, :, None] + (side * R + bins).to(tl.int64) * x.channel, at.mask[:, :, None] & (bins < R)


@triton.jit
def _load_bins(dist, at, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Logits [s, 4, RP], -inf past R."""
    offs, mask = _channels(dist, at, R, RP)
    logits = tl.load(dist.ptr + offs, mask=mask, other=0.0).to(DTYPE)
    if R != RP:
        logits = tl.where(tl.arange(0, RP)[None, None, :] < R, logits, float("-inf"))
    return logits


@triton.jit
def _distances(logits, bins, R: tl.constexpr):
    """Expected distances [s, 4]; with one bin the logit is the distance."""
    if R == 1:
        distance = tl.sum(logits, 2)
    else:
        _, e, norm = exponentials(logits, 2)
        distance = tl.sum(e * bins, 2) / norm
    return distance


@triton.jit
def _side_losses(logits, bins, sides, R: tl.constexpr):
    """DFL [s, 4] of every side or, with one bin, its L1 in shares of the image."""
    if R == 1:
        loss = tl.abs(sides.distance - sides.target) * sides.share
    else:
        shifted, _, norm = exponentials(logits, 2)
        weights = _bin_weights(sides.target, bins, R)
        loss = tl.log(norm) - tl.sum(tl.where(weights > 0, weights * shifted, 0.0), 2)
    return loss


@triton.jit
def _bin_grads(logits, bins, sides, d_distance, dfl_weight, R: tl.constexpr):
    """Gradient [s, 4, RP] of the logits: through the distance, and from DFL (or L1)."""
    if R == 1:
        error = sides.distance - sides.target
        sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
        grad = (d_distance + dfl_weight * sides.share * sign)[:, :, None]
    else:
        _, e, norm = exponentials(logits, 2)
        probs = e / norm[:, :, None]
        grad = probs * (bins - sides.distance[:, :, None]) * d_distance[:, :, None]
        grad += dfl_weight[:, :, None] * (probs - _bin_weights(sides.target, bins, R))
    return grad


@triton.jit
def _true_boxes(at, matched, stride, DTYPE: tl.constexpr):
    """Boxes [s, 1] of the rows in cells."""
    box = load_row_boxes(matched.box_ptr, 4, 1, at.row, at.mask, DTYPE)
    return Box(box.x1 / stride, box.y1 / stride, box.x2 / stride, box.y2 / stride)


@triton.jit
def _load_labels(at, matched, logits, weights_ptr, DTYPE: tl.constexpr):
    """Label [s, 1] of positives, its logit, and weight of its class."""
    label = tl.load(matched.label_ptr + at.row, mask=at.mask, other=0).to(tl.int64)
    offs = at.image * logits.image + at.anchor.to(tl.int64) * logits.anchor + label * logits.channel
    weight = tl.full(label.shape, 1, DTYPE)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + label, mask=at.mask, other=0.0).to(DTYPE)
    return label, tl.load(logits.ptr + offs, mask=at.mask, other=0.0).to(DTYPE), weight


@triton.jit
def _yolo11_positives_kernel(
    partial_ptr, grads, grad_ptr, normaliser_ptr, dist, logits, matched, weights_ptr, grid, height: tl.float64,
    width: tl.float64, box_gain: tl.float64, cls_gain: tl.float64, dfl_gain: tl.float64, count,
    STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program reads the box logits and the label's class logit of the positives in its SLOTS.

    It writes its own sums to ``partial`` (3, programs): box, what the dense pass has too much, DFL. Of the gradients it writes
    what the dense pass and the fill left to it.
    """
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)[:, None]
    at = _matched_anchors(slot, matched, count, grid.A, DTYPE)
    box, hits, dfl = tl.zeros((), DTYPE), tl.zeros((), DTYPE), tl.zeros((), DTYPE)
    if tl.max(at.mask.to(tl.int32)) > 0:
        x, y, stride = cell_centres(at.anchor, grid, STRIDES, DTYPE)
        gt = _true_boxes(at, matched, stride, DTYPE)
        side, bins = tl.arange(0, 4)[None, :], tl.arange(0, RP)[None, None, :].to(DTYPE)
        bin_logits = _load_bins(dist, at, R, RP, DTYPE)
        distance = _distances(bin_logits, bins, R)
        target = _of_side(side, x - gt.x1, y - gt.y1, gt.x2 - x, gt.y2 - y)
        share = stride / tl.where(side % 2 == 0, scalar(width, DTYPE), scalar(height, DTYPE))
        sides = Sides(side, distance, target, share)
        x1, y1 = x - _one_side(side, distance, 0), y - _one_side(side, distance, 1)
        x2, y2 = x + _one_side(side, distance, 2), y + _one_side(side, distance, 3)
        label, logit, weight = _load_labels(at, matched, logits, weights_ptr, DTYPE)
        if partial_ptr is not None:
            ciou = overlap(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            box = tl.sum(tl.where(at.mask, (1 - ciou) * at.score, 0.0))
            hits = tl.sum(tl.where(at.mask, logit * weight * at.score, 0.0))
            dfl = tl.sum(tl.where(at.mask, _side_losses(bin_logits, bins, sides, R) * (at.score / 4), 0.0))
        if grads is not None:
            scale = loss_scale(grad_ptr, normaliser_ptr, DTYPE)
            d_x1, d_y1, d_x2, d_y2 = overlap_derivative(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            d_distance = _of_side(side, d_x1, d_y1, -d_x2, -d_y2) * (scalar(box_gain, DTYPE) * at.score * scale)
            dfl_weight = scalar(dfl_gain, DTYPE) / 4 * at.score * scale + tl.zeros_like(distance)
            bin_grad = _bin_grads(bin_logits, bins, sides, d_distance, dfl_weight, R)
            offs, mask = _channels(grads.dist, at, R, RP)
            tl.store(grads.dist.ptr + offs, rounded(bin_grad, grads.dist.ptr.dtype.element_ty), mask=mask)
            error = (sigmoid(logit) - at.score) * weight * (scalar(cls_gain, DTYPE) * scale)
            offs = at.image * grads.scores.image + at.anchor.to(tl.int64) * grads.scores.anchor + label * grads.scores.channel
            tl.store(grads.scores.ptr + offs, rounded(error, grads.scores.ptr.dtype.element_ty), mask=at.mask)
    if partial_ptr is not None:
        ptr, programs = partial_ptr + tl.program_id(0), tl.num_programs(0)
        tl.store(ptr, box)
        tl.store(ptr + programs, hits)
        tl.store(ptr + 2 * programs, dfl)


class Loss(NamedTuple):
    """Loss (), its terms (3,), and the normaliser for backward (2,)."""

    ptr: Any
    terms_ptr: Any
    held_ptr: Any


@triton.jit
def _fill(ptr, value, count, BLOCK: tl.constexpr):
    """All programs together fill ``count`` numbers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        tl.store(ptr + offs, tl.full((BLOCK,), value, tl.float32).to(ptr.dtype.element_ty), mask=offs < count)
        start += tl.num_programs(0) * BLOCK


@triton.jit
def _fill_kernel(out_ptr, grad_ptr, normaliser_ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Programs fill a gradient with that of background: 0, or NaN where no number stands for the loss."""
    scale = loss_scale(grad_ptr, normaliser_ptr, DTYPE)
    _fill(out_ptr, tl.where(scale == scale, 0.0, scale).to(tl.float32), count, BLOCK)


@triton.jit(do_not_specialize=["dense", "programs"])
def _yolo11_total_kernel(
    loss, grads, counts, dense_ptr, partial_ptr, normaliser_ptr, box_gain: tl.float64, cls_gain: tl.float64,
    dfl_gain: tl.float64, dense, programs, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up the partial sums and writes the loss and its three terms.

    Into ``held`` it writes the normaliser for the backward pass: NaN if the sum over the class logits is. Where the normaliser
    is NaN already, all programs together make every gradient NaN.
    """
    normaliser = tl.load(normaliser_ptr).to(DTYPE)
    if grads is not None:
        if normaliser != normaliser:
            _fill(grads.dist.ptr, float("nan"), counts[0], BLOCK)
            _fill(grads.scores.ptr, float("nan"), counts[1], BLOCK)
    if tl.program_id(0) == 0:
        cls = total(dense_ptr, dense, DTYPE, BLOCK)
        is_broken = cls != cls
        normaliser = tl.where(is_broken, cls, normaliser)
        batch_size = tl.where(is_broken, cls, tl.load(normaliser_ptr + 1).to(DTYPE))
        tl.store(loss.held_ptr, normaliser)
        tl.store(loss.held_ptr + 1, batch_size)
        # A sum of finite numbers that overflows is not NaN.
        cls = tl.where(cls < float("inf"), cls - total(partial_ptr + programs, programs, DTYPE, BLOCK), cls)
        box_term = scalar(box_gain, DTYPE) * total(partial_ptr, programs, DTYPE, BLOCK) / normaliser
        cls_term = scalar(cls_gain, DTYPE) * cls / normaliser
        dfl_term = scalar(dfl_gain, DTYPE) * total(partial_ptr + 2 * programs, programs, DTYPE, BLOCK) / normaliser
        tl.store(loss.terms_ptr, box_term)
        tl.store(loss.terms_ptr + 1, cls_term)
        tl.store(loss.terms_ptr + 2, dfl_term)
        tl.store(loss.ptr, batch_size * (box_term + cls_term + dfl_term))
