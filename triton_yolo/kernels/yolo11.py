"""YOLO11's loss for a given assignment, forward and backward, with the one-hot target implied.

A dense pass, in ``classes``, takes every class logit for background; what belongs to positive anchors is worked out by slots,
few of which are empty, and put right afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import overlap, overlap_derivative, rounded, scalar, sigmoid
from .claims import owner_of, winning_row
from .classes import loss_scale
from .fill import fill
from .grid import cell_centres
from .launch import INTERPRETED
from .reduce import total
from .rows import CONTESTED, Box, load_row_boxes

FILL_BLOCK = 2**18 if INTERPRETED else 4096


def slot_sizes(num_slots: int) -> dict[str, int]:
    """Slots a program, and warps: a thread has one side of one slot, so that what belongs to a slot stays in a warp."""
    if INTERPRETED:
        return {"SLOTS": min(triton.next_power_of_2(max(num_slots, 1)), 2**16), "num_warps": 4}
    return {"SLOTS": 32, "num_warps": 4}


class Matched(NamedTuple):
    """An assignment: row and target score (B, A) of every anchor; label (N,) and box (N, 4) of every row."""

    row_ptr: Any
    score_ptr: Any
    label_ptr: Any
    box_ptr: Any


class Claims(NamedTuple):
    """Claims (N, K) of an assignment whose rows are states of ``claims``; images (N,) of the rows; ties of float64."""

    ptr: Any
    image_ptr: Any
    state: Any
    order_ptr: Any


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
    return Positives(mask, image.to(tl.int64), slot - image * A, row, score)


@triton.jit
def _claimed_anchors(slot, matched, claims, count, A, CLAIMS: tl.constexpr, DTYPE: tl.constexpr):
    """Slots are the claims of all rows; a contested anchor is in that of the row which its state names, whoever won it."""
    row = slot // CLAIMS
    anchor = tl.load(claims.ptr + slot, mask=slot < count, other=-1)
    is_claim = anchor >= 0
    image = tl.load(claims.image_ptr + row, mask=is_claim, other=0).to(tl.int64)
    cell = tl.where(is_claim, image * A + anchor, 0)
    state = tl.load(matched.row_ptr + cell, mask=is_claim, other=-1)
    mask = is_claim & (owner_of(state) == row)
    is_contested = mask & (state >= CONTESTED)
    won = winning_row(claims.state, claims.order_ptr, cell, is_contested, tl.float64 == DTYPE)
    score = tl.load(matched.score_ptr + cell, mask=mask, other=0.0).to(DTYPE)
    return Positives(mask, tl.where(mask, image, 0), tl.where(mask, anchor, 0), tl.where(is_contested, won, row), score)


class Sides(NamedTuple):
    """Sides [s, 4] of positives: expected and true distance in cells, length of a cell in shares of the image.

    The softmax over a side's bins is exp(logit - top) / norm.
    """

    distance: Any
    target: Any
    share: Any
    top: Any
    norm: Any


@triton.jit
def _of_side(side, left, top, right, bottom):
    """The values [s, 4] of all sides, from those [s, 1] of each."""
    return tl.where(side == 0, left, tl.where(side == 1, top, tl.where(side == 2, right, bottom)))


@triton.jit
def _one_side(side, values, N: tl.constexpr):
    """The values [s, 1] of one side."""
    return tl.sum(tl.where(side == N, values, 0.0), 1)[:, None]


@triton.jit
def _first_bins(x, at, side, R: tl.constexpr):
    """Where the first bin [s, 4] of every side lies in ``x`` (B, A, 4R).

    Bins are looped over, one address after the other: a thread has one side, whatever way Triton lays out a tile.
    """
    ptr = x.ptr + at.image * x.image + at.anchor.to(tl.int64) * x.anchor
    return ptr + (side * R).to(tl.int64) * x.channel


@triton.jit
def _softmax(dist, at, side, R: tl.constexpr, DTYPE: tl.constexpr):
    """Largest logit [s, 4] of every side, norm of the exponentials and expected bin; with one bin the logit is the distance."""
    first = _first_bins(dist, at, side, R)
    top = tl.load(first, mask=at.mask, other=0.0).to(DTYPE)
    norm, distance = tl.full(top.shape, 1, DTYPE), top
    if R > 1:
        ptr = first
        for _ in tl.static_range(1, R):
            ptr += dist.channel
            top = tl.maximum(top, tl.load(ptr, mask=at.mask, other=0.0).to(DTYPE))
        ptr = first
        norm, moment = tl.zeros(top.shape, DTYPE), tl.zeros(top.shape, DTYPE)
        for r in tl.static_range(R):
            e = tl.exp(tl.load(ptr, mask=at.mask, other=0.0).to(DTYPE) - top)
            norm, moment = norm + e, moment + e * r
            ptr += dist.channel
        distance = moment / norm
    return top, norm, distance


@triton.jit
def _bin_target(target, R: tl.constexpr):
    """Distances [s, 4] as DFL has them, between two bins."""
    last = tl.full(target.shape, R - 1 - 0.01, target.dtype)  # a bare constant would be rounded to float32
    return tl.minimum(tl.maximum(target, 0.0), last)


@triton.jit
def _bin_weight(target, r):
    """Weight of a bin: it falls off linearly to the next."""
    return tl.maximum(1 - tl.abs(r - target), 0.0)


@triton.jit
def _bin_loss(dist, at, first, r, sides, target, DTYPE: tl.constexpr):
    """Share [s, 4] of one bin each in DFL, but for the norm."""
    logit = tl.load(first + r.to(tl.int64) * dist.channel, mask=at.mask, other=0.0).to(DTYPE)
    weight = _bin_weight(target, r)
    return tl.where(weight > 0, weight * (logit - sides.top), 0.0)


@triton.jit
def _side_losses(dist, at, side, sides, R: tl.constexpr, DTYPE: tl.constexpr):
    """DFL [s, 4] of every side or, with one bin, its L1 in shares of the image."""
    if R == 1:
        loss = tl.abs(sides.distance - sides.target) * sides.share
    else:
        target, first = _bin_target(sides.target, R), _first_bins(dist, at, side, R)
        low = tl.floor(target)
        loss = tl.log(sides.norm)
        loss -= _bin_loss(dist, at, first, low, sides, target, DTYPE)
        loss -= _bin_loss(dist, at, first, low + 1, sides, target, DTYPE)
    return loss


@triton.jit
def _write_bin_grads(out, dist, at, side, sides, d_distance, dfl_weight, R: tl.constexpr, DTYPE: tl.constexpr):
    """Write the gradient of the logits: through the distance [s, 4], and from DFL (or L1)."""
    ptr, out_ptr = _first_bins(dist, at, side, R), _first_bins(out, at, side, R)
    if R == 1:
        error = sides.distance - sides.target
        sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
        grad = d_distance + dfl_weight * sides.share * sign
        tl.store(out_ptr, rounded(grad, out.ptr.dtype.element_ty), mask=at.mask)
    else:
        target, scale = _bin_target(sides.target, R), 1 / sides.norm
        for r in tl.static_range(R):
            prob = tl.exp(tl.load(ptr, mask=at.mask, other=0.0).to(DTYPE) - sides.top) * scale
            grad = prob * (r - sides.distance) * d_distance + dfl_weight * (prob - _bin_weight(target, r))
            tl.store(out_ptr, rounded(grad, out.ptr.dtype.element_ty), mask=at.mask)
            ptr += dist.channel
            out_ptr += out.channel


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


@triton.jit(do_not_specialize=["count"])
def _yolo11_positives_kernel(
    partial_ptr, grads, grad_ptr, normaliser_ptr, dist, logits, matched, claims, weights_ptr, grid, height: tl.float64,
    width: tl.float64, box_gain: tl.float64, cls_gain: tl.float64, dfl_gain: tl.float64, count,
    STRIDES: tl.constexpr, R: tl.constexpr, CLAIMS: tl.constexpr, DTYPE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program reads the box logits and the label's class logit of the positives in its SLOTS.

    It writes its own sums to ``partial`` (3, programs): box, what the dense pass has too much, DFL. Of the gradients it writes
    what the dense pass and the fill left to it.
    """
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)[:, None]
    if CLAIMS == 0:
        at = _matched_anchors(slot, matched, count, grid.A, DTYPE)
    else:
        at = _claimed_anchors(slot, matched, claims, count, grid.A, CLAIMS, DTYPE)
    box, hits, dfl = tl.zeros((), DTYPE), tl.zeros((), DTYPE), tl.zeros((), DTYPE)
    if tl.max(at.mask.to(tl.int32)) > 0:
        x, y, stride = cell_centres(at.anchor, grid, STRIDES, DTYPE)
        gt = _true_boxes(at, matched, stride, DTYPE)
        side = tl.arange(0, 4)[None, :]
        top, norm, distance = _softmax(dist, at, side, R, DTYPE)
        target = _of_side(side, x - gt.x1, y - gt.y1, gt.x2 - x, gt.y2 - y)
        share = stride / tl.where(side % 2 == 0, scalar(width, DTYPE), scalar(height, DTYPE))
        sides = Sides(distance, target, share, top, norm)
        x1, y1 = x - _one_side(side, distance, 0), y - _one_side(side, distance, 1)
        x2, y2 = x + _one_side(side, distance, 2), y + _one_side(side, distance, 3)
        label, logit, weight = _load_labels(at, matched, logits, weights_ptr, DTYPE)
        if partial_ptr is not None:
            ciou = overlap(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            box = tl.sum(tl.where(at.mask, (1 - ciou) * at.score, 0.0))
            hits = tl.sum(tl.where(at.mask, logit * weight * at.score, 0.0))
            dfl = tl.sum(tl.where(at.mask, _side_losses(dist, at, side, sides, R, DTYPE) * (at.score / 4), 0.0))
        if grads is not None:
            scale = loss_scale(grad_ptr, normaliser_ptr, DTYPE)
            d_x1, d_y1, d_x2, d_y2 = overlap_derivative(x1, y1, x2, y2, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
            d_distance = _of_side(side, d_x1, d_y1, -d_x2, -d_y2) * (scalar(box_gain, DTYPE) * at.score * scale)
            dfl_weight = scalar(dfl_gain, DTYPE) / 4 * at.score * scale
            _write_bin_grads(grads.dist, dist, at, side, sides, d_distance, dfl_weight, R, DTYPE)
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
def _fill_kernel(out_ptr, grad_ptr, normaliser_ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Programs fill a gradient with that of background: 0, or NaN where no number stands for the loss."""
    scale = loss_scale(grad_ptr, normaliser_ptr, DTYPE)
    fill(out_ptr, tl.where(scale == scale, 0.0, scale), count, tl.program_id(0), tl.num_programs(0), BLOCK)


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
        num_broken = (normaliser != normaliser).to(tl.int64)
        fill(grads.dist.ptr, float("nan"), num_broken * counts[0], tl.program_id(0), tl.num_programs(0), BLOCK)
        fill(grads.scores.ptr, float("nan"), num_broken * counts[1], tl.program_id(0), tl.num_programs(0), BLOCK)
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
