"""YOLO11's loss for a given assignment, forward and backward, with the one-hot target implied."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import expectation, log_product, overlap, overlap_derivative, rounded, scalar, sigmoid, softplus, split_softplus
from .decode import side_distance, side_logits, store_side
from .grid import cell_centres
from .launch import INTERPRETED
from .reduce import total
from .rows import Box, load_row_boxes


def dense_sizes(num_anchors: int, num_classes: int, stride_c: int) -> tuple[int, int, int]:
    """Anchors and classes a tile, and warps, of a pass over the class logits.

    Whichever dimension is contiguous gets enough of the tile for 16 bytes a thread; 4,096 logits a tile are 32 a thread, so
    that a thread has several loads in flight and the loop over the classes is short.
    """
    classes = triton.next_power_of_2(num_classes)
    if INTERPRETED:
        block_a = min(triton.next_power_of_2(num_anchors), 2**14)
        return block_a, min(classes, max(1, 2**20 // block_a)), 1
    if stride_c == 1:
        return 32, min(classes, 128), 4
    return 256, min(classes, 16), 4


class Matched(NamedTuple):
    """An assignment: row and target score (B, A) of every anchor; label (N,) and box (N, 4) of every row."""

    row_ptr: Any
    score_ptr: Any
    label_ptr: Any
    box_ptr: Any


@triton.jit
def _target_sides(row, is_pos, box_ptr, stride, DTYPE: tl.constexpr):
    """Corners [n] of the true boxes in cells."""
    box = load_row_boxes(box_ptr, 4, 1, row, is_pos, DTYPE)
    return Box(box.x1 / stride, box.y1 / stride, box.x2 / stride, box.y2 / stride)


@triton.jit
def _of_side(side, left, top, right, bottom):
    """The values of one of the four sides. Loops over sides are not unrolled: all four at once would spill registers."""
    return tl.where(side == 0, left, tl.where(side == 1, top, tl.where(side == 2, right, bottom)))


@triton.jit
def _bin_weights(target, bins, R: tl.constexpr):
    """Weights [R, n] of the two bins around distances [n], 0 for the others: they fall off linearly to the next bin."""
    last = tl.full(target.shape, R - 1 - 0.01, target.dtype)  # a bare constant would be rounded to float32
    target = tl.minimum(tl.maximum(target, 0.0), last)
    return tl.maximum(1 - tl.abs(bins - target[None, :]), 0.0)


@triton.jit
def _side_loss(dist, image, target, share, offs_a, is_pos, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side and its DFL, or with one bin its L1 in shares of the image."""
    logits = side_logits(dist, image, offs_a, is_pos, side, R, RP, DTYPE)
    if R == 1:
        distance = tl.sum(logits, 0)
        loss = tl.abs(distance - target) * share
    else:
        bins = tl.arange(0, RP)[:, None].to(DTYPE)
        shifted = logits - tl.max(logits, 0)[None, :]
        e = tl.exp(shifted)
        norm = tl.sum(e, 0)
        distance = tl.sum(e * bins, 0) / norm
        weights = _bin_weights(target, bins, R)
        loss = tl.log(norm) - tl.sum(tl.where(weights > 0, weights * shifted, 0.0), 0)
    return distance, loss


@triton.jit
def _loss_scale(grad_ptr, normaliser_ptr, DTYPE: tl.constexpr):
    """What every gradient of a sum over anchors is multiplied by; the loss's own is 1 if it is not given."""
    batch_size, normaliser = tl.load(normaliser_ptr + 1).to(DTYPE), tl.load(normaliser_ptr).to(DTYPE)
    if grad_ptr is not None:
        batch_size = tl.load(grad_ptr).to(DTYPE) * batch_size
    return batch_size / normaliser


@triton.jit
def _class_loss(
    logits, weights_ptr, image, offs_a, mask_a, C, HAS_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Cross entropy of the logits of anchors [n] against no class, spread over a tile."""
    ptr = logits.ptr + image * logits.image
    # Anchors come first here and last in the box part: tiles of one shape would have to share the layout of 16-byte loads.
    cls = tl.zeros((offs_a.shape[0], BLOCK_C), DTYPE)
    start = 0
    while start < C:
        # The sum of log(1 + e) is the logarithm of a product, below 2^64. Its excess over 1 keeps what is small.
        excess = tl.zeros((offs_a.shape[0], BLOCK_C), DTYPE)
        end = tl.minimum(start + 64 * BLOCK_C, C)
        while start < end:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_a[:, None] & (offs_c < C)[None, :]
            offs = offs_a.to(tl.int64)[:, None] * logits.anchor + offs_c.to(tl.int64)[None, :] * logits.channel
            x = tl.load(ptr + offs, mask=mask, other=-1e4).to(DTYPE)  # a loss of 0
            if HAS_WEIGHTS:
                weights = tl.load(weights_ptr + offs_c, mask=offs_c < C, other=0.0).to(DTYPE)
                cls += softplus(x) * weights[None, :]
            else:
                most, e = split_softplus(x)
                cls += most
                excess = tl.fma(excess, e, excess + e)
            start += BLOCK_C
        cls += log_product(excess)
    return cls


@triton.jit
def _yolo11_loss_kernel(
    partial_ptr, dist, logits, matched, weights_ptr, grid, height: tl.float64, width: tl.float64, C,
    STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads the class logits of BLOCK_A anchors of one image, and the box logits of those that are positive.

    It writes its own sums to ``partial`` (3, programs): box, classification, DFL.
    """
    image = tl.program_id(1).to(tl.int64)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < grid.A
    row = tl.load(matched.row_ptr + image * grid.A + offs_a, mask=mask_a, other=-1)
    score = tl.load(matched.score_ptr + image * grid.A + offs_a, mask=mask_a, other=0.0).to(DTYPE)
    is_pos = row >= 0
    label = tl.load(matched.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)

    cls = _class_loss(logits, weights_ptr, image, offs_a, mask_a, C, HAS_WEIGHTS, DTYPE, BLOCK_C)
    offs = image * logits.image + offs_a.to(tl.int64) * logits.anchor + label.to(tl.int64) * logits.channel
    hit = tl.load(logits.ptr + offs, mask=is_pos, other=0.0).to(DTYPE) * score
    if HAS_WEIGHTS:
        hit *= tl.load(weights_ptr + label, mask=is_pos, other=0.0).to(DTYPE)
    programs = tl.num_programs(0) * tl.num_programs(1)
    cls_sum, hits = tl.sum(cls), tl.sum(hit)
    # A sum of finite numbers that overflows is not NaN.
    tl.store(partial_ptr + programs + program, tl.where(cls_sum < float("inf"), cls_sum - hits, cls_sum))

    box = tl.zeros((BLOCK_A,), DTYPE)
    dfl = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row, 0) >= 0:
        # Two anchors a thread, as in the tensors of one value an anchor; eight, as in a load of 16 bytes, spill registers.
        offs_a = tl.max_contiguous(tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A), 2)
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        gt = _target_sides(row, is_pos, matched.box_ptr, stride, DTYPE)
        x_share, y_share = stride / scalar(width, DTYPE), stride / scalar(height, DTYPE)
        left, top, right, bottom = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for side in range(4):
            target = _of_side(side, x - gt.x1, y - gt.y1, gt.x2 - x, gt.y2 - y)
            share = _of_side(side, x_share, y_share, x_share, y_share)
            distance, side_dfl = _side_loss(dist, image, target, share, offs_a, is_pos, side, R, RP, DTYPE)
            left, top = tl.where(side == 0, distance, left), tl.where(side == 1, distance, top)
            right, bottom = tl.where(side == 2, distance, right), tl.where(side == 3, distance, bottom)
            dfl += side_dfl
        ciou = overlap(x - left, y - top, x + right, y + bottom, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7)
        box = tl.where(is_pos, (1 - ciou) * score, 0.0)
        dfl = tl.where(is_pos, dfl / 4 * score, 0.0)
    tl.store(partial_ptr + program, tl.sum(box))
    tl.store(partial_ptr + 2 * programs + program, tl.sum(dfl))


class Loss(NamedTuple):
    """Loss (), its terms (3,), and the normaliser for backward (2,)."""

    ptr: Any
    terms_ptr: Any
    held_ptr: Any


@triton.jit(do_not_specialize=["programs"])
def _yolo11_total_kernel(
    loss, partial_ptr, normaliser_ptr, box_gain: tl.float64, cls_gain: tl.float64, dfl_gain: tl.float64, programs,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the partial sums and writes the loss and its three terms.

    Into ``held`` it writes the normaliser for the backward pass: NaN if the sum over the class logits is.
    """
    cls = total(partial_ptr + programs, programs, DTYPE, BLOCK)
    is_broken = cls != cls
    normaliser = tl.where(is_broken, cls, tl.load(normaliser_ptr).to(DTYPE))
    batch_size = tl.where(is_broken, cls, tl.load(normaliser_ptr + 1).to(DTYPE))
    tl.store(loss.held_ptr, normaliser)
    tl.store(loss.held_ptr + 1, batch_size)
    box_term = scalar(box_gain, DTYPE) * total(partial_ptr, programs, DTYPE, BLOCK) / normaliser
    cls_term = scalar(cls_gain, DTYPE) * cls / normaliser
    dfl_term = scalar(dfl_gain, DTYPE) * total(partial_ptr + 2 * programs, programs, DTYPE, BLOCK) / normaliser
    tl.store(loss.terms_ptr, box_term)
    tl.store(loss.terms_ptr + 1, cls_term)
    tl.store(loss.terms_ptr + 2, dfl_term)
    tl.store(loss.ptr, batch_size * (box_term + cls_term + dfl_term))


@triton.jit
def _class_grad_kernel(
    out, grad_ptr, normaliser_ptr, logits, matched, weights_ptr, cls_gain: tl.float64, A,
    C: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads one tile of class logits and writes its gradient."""
    image = tl.program_id(2).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_a = offs_a < A
    row = tl.load(matched.row_ptr + image * A + offs_a, mask=mask_a, other=-1)
    score = tl.load(matched.score_ptr + image * A + offs_a, mask=mask_a, other=0.0).to(DTYPE)
    label = tl.load(matched.label_ptr + row, mask=row >= 0, other=-1).to(tl.int32)

    mask = mask_a[None, :] & (offs_c < C)[:, None]
    offs = offs_c.to(tl.int64)[:, None] * logits.channel + offs_a.to(tl.int64)[None, :] * logits.anchor
    x = tl.load(logits.ptr + image * logits.image + offs, mask=mask, other=0.0).to(DTYPE)
    error = sigmoid(x) - tl.where(offs_c[:, None] == label[None, :], score[None, :], 0.0)
    if HAS_WEIGHTS:
        error = error * tl.load(weights_ptr + offs_c, mask=offs_c < C, other=0.0).to(DTYPE)[:, None]
    scale = scalar(cls_gain, DTYPE) * _loss_scale(grad_ptr, normaliser_ptr, DTYPE)
    offs = offs_c.to(tl.int64)[:, None] * out.channel + offs_a.to(tl.int64)[None, :] * out.anchor
    tl.store(out.ptr + image * out.image + offs, rounded(error * scale, out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _side_grad(
    out, dist, image, target, share, d_distance, dfl_weight, zero, offs_a, mask_a, is_pos, side,
    R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one side's logits: through the distance, and from DFL (or L1); of background, ``zero``."""
    logits = side_logits(dist, image, offs_a, is_pos, side, R, RP, DTYPE)
    bins = tl.arange(0, RP)[:, None].to(DTYPE)
    probs, distance = expectation(logits, bins, R)
    if R == 1:
        error = distance - target
        sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
        grad = (d_distance + dfl_weight * share * sign)[None, :]
    else:
        through = probs * (bins - distance[None, :]) * d_distance[None, :]
        grad = through + dfl_weight[None, :] * (probs - _bin_weights(target, bins, R))
    store_side(out, image, tl.where(is_pos[None, :], grad, zero), offs_a, mask_a, side, R, RP)


@triton.jit
def _box_grad_kernel(
    out, grad_ptr, normaliser_ptr, dist, matched, grid, height: tl.float64, width: tl.float64, box_gain: tl.float64,
    dfl_gain: tl.float64, STRIDES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of the box logits of BLOCK_A anchors of one image, 0 for background.

    It reads the logits of positive anchors only, twice: the CIoU needs all four distances first.
    """
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.max_contiguous(tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A), 2)
    mask_a = offs_a < grid.A
    row = tl.load(matched.row_ptr + image * grid.A + offs_a, mask=mask_a, other=-1)
    is_pos = row >= 0
    scale = _loss_scale(grad_ptr, normaliser_ptr, DTYPE)
    zero = tl.where(scale == scale, 0.0, scale)  # NaN for every anchor if any logit is not finite
    if tl.max(row, 0) >= 0:
        x, y, stride = cell_centres(offs_a, grid, STRIDES, DTYPE)
        gt = _target_sides(row, is_pos, matched.box_ptr, stride, DTYPE)
        left, top, right, bottom = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for side in range(4):
            distance = side_distance(dist, image, offs_a, is_pos, side, R, RP, DTYPE)
            left, top = tl.where(side == 0, distance, left), tl.where(side == 1, distance, top)
            right, bottom = tl.where(side == 2, distance, right), tl.where(side == 3, distance, bottom)
        d_x1, d_y1, d_x2, d_y2 = overlap_derivative(
            x - left, y - top, x + right, y + bottom, gt.x1, gt.y1, gt.x2, gt.y2, "ciou", 1e-7
        )
        score = tl.load(matched.score_ptr + image * grid.A + offs_a, mask=is_pos, other=0.0).to(DTYPE)
        weight = score * scale
        box_weight, dfl_weight = scalar(box_gain, DTYPE) * weight, scalar(dfl_gain, DTYPE) / 4 * weight
        x_share, y_share = stride / scalar(width, DTYPE), stride / scalar(height, DTYPE)
        for side in range(4):
            target = _of_side(side, x - gt.x1, y - gt.y1, gt.x2 - x, gt.y2 - y)
            share = _of_side(side, x_share, y_share, x_share, y_share)
            d_distance = box_weight * _of_side(side, d_x1, d_y1, -d_x2, -d_y2)
            _side_grad(
                out, dist, image, target, share, d_distance, dfl_weight, zero, offs_a, mask_a, is_pos, side, R, RP, DTYPE
            )
    else:
        zeros = tl.zeros((RP, BLOCK_A), DTYPE) + zero
        for side in range(4):
            store_side(out, image, zeros, offs_a, mask_a, side, R, RP)
