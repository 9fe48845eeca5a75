"""Tile functions of positive anchors, found by slots: the sides of their boxes with distributions, and their class logits."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import rounded, sigmoid
from .claims import owner_of
from .launch import INTERPRETED
from .rows import CONTESTED
from .task_aligned_score import winning_row


def slot_sizes(num_slots: int) -> dict[str, int]:
    """Slots a program, and warps: a thread has one side of one slot, so that what belongs to a slot stays in a warp."""
    if INTERPRETED:
        return {"SLOTS": min(triton.next_power_of_2(max(num_slots, 1)), 2**16), "num_warps": 4}
    return {"SLOTS": 32, "num_warps": 4}


class Matched(NamedTuple):
    """An assignment: row and target score (B, A) of every anchor; label (N,) and box (N, 4), oriented (N, 5), of every row."""

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


class Positives(NamedTuple):
    """Slots [s, 1]: whether there is a positive anchor in each; its image, number, row and target score."""

    mask: Any
    image: Any
    anchor: Any
    row: Any
    score: Any


@triton.jit
def load_positives(matched, claims, count, A, CLAIMS: tl.constexpr, DTYPE: tl.constexpr, SLOTS: tl.constexpr):
    """The positives among the slots of a program: with ``CLAIMS`` of a row these are claims, else anchors."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)[:, None]
    if CLAIMS == 0:
        at = _matched_anchors(slot, matched, count, A, DTYPE)
    else:
        at = _claimed_anchors(slot, matched, claims, count, A, CLAIMS, DTYPE)
    return at


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
def of_side(side, left, top, right, bottom):
    """The values [s, 4] of all sides, from those [s, 1] of each."""
    return tl.where(side == 0, left, tl.where(side == 1, top, tl.where(side == 2, right, bottom)))


@triton.jit
def one_side(side, values, N: tl.constexpr):
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
def side_softmax(dist, at, side, R: tl.constexpr, DTYPE: tl.constexpr):
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
def side_losses(dist, at, side, sides, R: tl.constexpr, DTYPE: tl.constexpr):
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
def write_bin_grads(out, dist, at, side, sides, d_distance, dfl_weight, R: tl.constexpr, DTYPE: tl.constexpr):
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
def load_labels(at, matched, logits, weights_ptr, DTYPE: tl.constexpr):
    """Label [s, 1] of positives, its logit, and weight of its class."""
    label = tl.load(matched.label_ptr + at.row, mask=at.mask, other=0).to(tl.int64)
    offs = at.image * logits.image + at.anchor.to(tl.int64) * logits.anchor + label * logits.channel
    weight = tl.full(label.shape, 1, DTYPE)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + label, mask=at.mask, other=0.0).to(DTYPE)
    return label, tl.load(logits.ptr + offs, mask=at.mask, other=0.0).to(DTYPE), weight


@triton.jit
def write_label_grad(out, at, label, logit, weight, scale):
    """Write the gradient of the label's logit [s, 1], whose target is a score and not 0."""
    error = (sigmoid(logit) - at.score) * weight * scale
    offs = at.image * out.image + at.anchor.to(tl.int64) * out.anchor + label * out.channel
    tl.store(out.ptr + offs, rounded(error, out.ptr.dtype.element_ty), mask=at.mask)
