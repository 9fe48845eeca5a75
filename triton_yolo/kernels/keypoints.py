"""Object keypoint similarity and visibility of the positive anchors, with the gradient.

A program looks through the rows of its anchors, of which one in thirty has one, leaves the positives without gaps, and takes
tiles of them [p, k], a lane a keypoint.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Tensor2, Tensor3
from .boxes import cross_entropy_with_logits, rounded, scalar, sigmoid
from .fill import fill
from .grid import cell_centres, sized
from .launch import INTERPRETED
from .oriented import one_less_exp
from .reduce import total

FILL_BLOCK = 2**18 if INTERPRETED else 4096


class Tile(NamedTuple):
    """Constants: anchors a program, positives a tile, and lanes for their keypoints."""

    SLOTS: int
    BLOCK_P: int
    BLOCK_K: int


class Kind(NamedTuple):
    """Constants: a sigma a keypoint, and numbers a keypoint of predictions and of ground truth."""

    SIGMAS: tuple[float, ...]
    D: int
    GT_D: int


class Truth(NamedTuple):
    """Row (B, A) of every anchor; keypoints (N, K, 2 or 3) and sizes of boxes (N, 2) of any layout."""

    row_ptr: Any
    keypoints: Tensor3
    sizes: Tensor2


class Counts(NamedTuple):
    """Number of positives (), and of images: (), or, where that is None, ``B``."""

    num_fg_ptr: Any
    num_images_ptr: Any
    B: int


class Positives(NamedTuple):
    """Positives [p, 1]: whether there is one, its image, number and row."""

    mask: Any
    image: Any
    anchor: Any
    row: Any


class Errors(NamedTuple):
    """How far keypoints [p, k] are off in cells, 0 where unseen; what their square is multiplied by; share in the mean."""

    dx: Any
    dy: Any
    per_square: Any
    share: Any


def tile_sizes(count: int, num_keypoints: int) -> tuple[Tile, int]:
    """A tile, and warps."""
    block_k = triton.next_power_of_2(num_keypoints)
    if INTERPRETED:
        return Tile(min(triton.next_power_of_2(max(count, 1)), 2**16), max(1, 2**12 // block_k), block_k), 4
    return Tile(32, max(1, 128 // block_k), block_k), 1


# ---- formulas


@triton.jit
def _per_variance(offs_k, SIGMAS: tl.constexpr, DTYPE: tl.constexpr):
    """What squared distances of keypoints [1, k] are multiplied by, in boxes of area 1."""
    result = tl.zeros(offs_k.shape, DTYPE)
    for k in tl.static_range(len(SIGMAS)):
        result = tl.where(offs_k == k, scalar(1 / (8 * SIGMAS[k] * SIGMAS[k]), DTYPE), result)
    return result


@triton.jit
def keypoint_distance(x):
    """1 - OKS of every keypoint, by its share."""
    return x.share * one_less_exp((x.dx * x.dx + x.dy * x.dy) * x.per_square)


@triton.jit
def keypoint_slope(x):
    """Its derivative by raw numbers, which are half as far apart, of which dx and dy are multiples; 0 wherever it is flat."""
    similarity = tl.exp(-(x.dx * x.dx + x.dy * x.dy) * x.per_square)
    slope = 4 * x.share * x.per_square * similarity
    return tl.where(similarity > 0, slope * x.dx, 0.0), tl.where(similarity > 0, slope * x.dy, 0.0)


# ---- positives


@triton.jit
def _leave_positives(places_ptr, row_ptr, count, SLOTS: tl.constexpr):
    """Leave the positives among the program's anchors without gaps, and say how many there are."""
    first = tl.program_id(0) * SLOTS
    slot = first + tl.arange(0, SLOTS)
    is_pos = tl.load(row_ptr + slot, mask=slot < count, other=-1) >= 0
    nth = tl.cumsum(is_pos.to(tl.int32), 0) - 1
    tl.store(places_ptr + first + nth, slot, mask=is_pos)
    tl.debug_barrier()
    return tl.sum(is_pos.to(tl.int32))


@triton.jit
def _load_positives(places_ptr, row_ptr, start, number, A, TILE: tl.constexpr):
    nth = start + tl.arange(0, TILE.BLOCK_P)[:, None]
    mask = nth < number
    slot = tl.load(places_ptr + tl.program_id(0) * TILE.SLOTS + nth, mask=mask, other=0)
    image = slot // A
    return Positives(mask, image.to(tl.int64), slot - image * A, tl.load(row_ptr + slot, mask=mask, other=0))


@triton.jit
def _raw_place(x, at, offs_k, D: tl.constexpr):
    """Where the first number [p, k] of every keypoint lies in ``x`` (B, A, K * D)."""
    return x.ptr + at.image * x.image + at.anchor.to(tl.int64) * x.anchor + offs_k.to(tl.int64) * D * x.channel


@triton.jit
def _store(ptr, x, mask):
    tl.store(ptr, rounded(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _load_truth(truth, at, offs_k, mask, height, width, GT_D: tl.constexpr, DTYPE: tl.constexpr):
    """Places of keypoints [p, k] in pixels, which are visible, and areas of boxes [p, 1]."""
    step = truth.keypoints.channel
    ptr = truth.keypoints.ptr + at.row.to(tl.int64) * truth.keypoints.image + offs_k.to(tl.int64) * truth.keypoints.anchor
    x = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    y = tl.load(ptr + step, mask=mask, other=0.0).to(DTYPE)
    visible = mask & _is_finite(x) & _is_finite(y)
    if GT_D == 3:
        flag = tl.load(ptr + 2 * step, mask=mask, other=0.0).to(DTYPE)
        visible = visible & _is_finite(flag) & (flag != 0)
    width, height = scalar(width, DTYPE), scalar(height, DTYPE)
    ptr = truth.sizes.ptr + at.row.to(tl.int64) * truth.sizes.row
    w = tl.load(ptr, mask=at.mask, other=0.0).to(DTYPE) * width
    h = tl.load(ptr + truth.sizes.column, mask=at.mask, other=0.0).to(DTYPE) * height
    return x * width, y * height, visible, w * h


@triton.jit
def _errors(raw_x, raw_y, gt_x, gt_y, visible, area, per_variance, at, grid, STRIDES: tl.constexpr, DTYPE: tl.constexpr):
    """Of keypoints at twice the raw distance from the corner of their anchor's cell."""
    x, y, stride = cell_centres(at.anchor, grid, STRIDES, DTYPE)
    area = area / (stride * stride) + 1e-9
    dx = tl.where(visible, 2 * raw_x + (x - 0.5) - gt_x / stride, 0.0)
    dy = tl.where(visible, 2 * raw_y + (y - 0.5) - gt_y / stride, 0.0)
    number = tl.maximum(tl.sum(visible.to(tl.int32), 1), 1)[:, None].to(DTYPE)
    return Errors(dx, dy, per_variance / area, tl.where(visible, 1 / number, 0.0))


@triton.jit
def _num_fg(counts, DTYPE: tl.constexpr):
    """What the terms are divided by."""
    number = tl.load(counts.num_fg_ptr).to(DTYPE)
    return tl.where(number > 0, number, 1.0)


@triton.jit
def _num_images(counts, DTYPE: tl.constexpr):
    """What their sum is multiplied by."""
    if counts.num_images_ptr is None:
        number = tl.full((), counts.B, DTYPE)
    else:
        number = tl.load(counts.num_images_ptr).to(DTYPE)
    return number


@triton.jit(do_not_specialize=["count"])
def _keypoint_positives_kernel(
    partial_ptr, places_ptr, out, preds, truth, counts, grid, height: tl.float64, width: tl.float64, pose_gain: tl.float64,
    kobj_gain: tl.float64, count, STRIDES: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A program reads all of the positives among its anchors, and writes their gradient, if there is ``out``.

    It writes its own sums to ``partial`` (2, programs): 1 - OKS, and the loss of the flags; NaN after a number that is not
    finite.
    """
    grid = sized(grid)
    number = _leave_positives(places_ptr, truth.row_ptr, count, TILE.SLOTS)
    offs_k = tl.arange(0, TILE.BLOCK_K)[None, :]
    SIGMAS: tl.constexpr = KIND.SIGMAS
    K: tl.constexpr = len(KIND.SIGMAS)
    per_variance = _per_variance(offs_k, SIGMAS, DTYPE)
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    pose, flags = tl.zeros((BLOCK_P, offs_k.shape[1]), DTYPE), tl.zeros((BLOCK_P, offs_k.shape[1]), DTYPE)
    start = 0
    while start < number:
        at = _load_positives(places_ptr, truth.row_ptr, start, number, grid.A, TILE)
        mask = at.mask & (offs_k < K)
        ptr = _raw_place(preds, at, offs_k, KIND.D)
        raw_x = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
        raw_y = tl.load(ptr + preds.channel, mask=mask, other=0.0).to(DTYPE)
        gt_x, gt_y, visible, area = _load_truth(truth, at, offs_k, mask, height, width, KIND.GT_D, DTYPE)
        x = _errors(raw_x, raw_y, gt_x, gt_y, visible, area, per_variance, at, grid, STRIDES, DTYPE)
        pose += keypoint_distance(x) + (raw_x * 0.0 + raw_y * 0.0)
        if KIND.D == 3:
            logit = tl.load(ptr + 2 * preds.channel, mask=mask, other=0.0).to(DTYPE)
            flag = visible.to(DTYPE)
            flags += tl.where(mask, cross_entropy_with_logits(logit, flag), 0.0)
        if out is not None:
            scale = _num_images(counts, DTYPE) / _num_fg(counts, DTYPE)
            d_x, d_y = keypoint_slope(x)
            slope, flag_slope = scalar(pose_gain, DTYPE) * scale, scalar(kobj_gain, DTYPE) / K * scale
            out_ptr = _raw_place(out, at, offs_k, KIND.D)
            _store(out_ptr, d_x * slope, mask)
            _store(out_ptr + out.channel, d_y * slope, mask)
            if KIND.D == 3:
                _store(out_ptr + 2 * out.channel, (sigmoid(logit) - flag) * flag_slope, mask)
        start += BLOCK_P
    tl.store(partial_ptr + tl.program_id(0), tl.sum(pose))
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(flags))


class Gradients(NamedTuple):
    """Gradient of the keypoints, so many numbers, and of the other loss ()."""

    ptr: Any
    size: int
    other_ptr: Any


class Results(NamedTuple):
    """The loss () and its two terms ()."""

    loss_ptr: Any
    terms: Any


@triton.jit
def _keypoint_fill_kernel(ptr, count, BLOCK: tl.constexpr):
    """Programs fill a gradient with that of background."""
    fill(ptr, 0.0, count, tl.program_id(0), tl.num_programs(0), BLOCK)


@triton.jit(do_not_specialize=["programs"])
def _keypoint_total_kernel(
    results, grads, partial_ptr, other_ptr, counts, pose_gain: tl.float64, kobj_gain: tl.float64, programs, K: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up the partial sums and writes the loss and its two terms.

    If the loss is NaN, all programs together make every gradient NaN, and the first the terms.
    """
    per_image = scalar(pose_gain, DTYPE) / _num_fg(counts, DTYPE)
    pose = total(partial_ptr, programs, DTYPE, BLOCK) * per_image
    kobj = total(partial_ptr + programs, programs, DTYPE, BLOCK) * (scalar(kobj_gain, DTYPE) / K / _num_fg(counts, DTYPE))
    loss = tl.load(other_ptr).to(DTYPE) + _num_images(counts, DTYPE) * (pose + kobj)
    is_broken = loss != loss
    if grads is not None:
        size = is_broken.to(tl.int64) * grads.size
        fill(grads.ptr, float("nan"), size, tl.program_id(0), tl.num_programs(0), BLOCK)
    if tl.program_id(0) == 0:
        tl.store(results.loss_ptr, loss)
        tl.store(results.terms[0], tl.where(is_broken, loss, pose))
        tl.store(results.terms[1], tl.where(is_broken, loss, kobj))
        if grads is not None:
            tl.store(grads.other_ptr, tl.where(is_broken, loss, 1.0))
