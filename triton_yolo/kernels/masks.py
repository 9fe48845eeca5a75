"""The mask term of instance segmentation: cross entropy of positives' masks inside their targets' boxes, and its gradients.

Logits are worked out where they are needed, a tile of pixels at a time, and kept nowhere. Positives of an image are listed in
the order of their anchors. The gradient of coefficients is a sum over the pixels of one positive: programs share all tiles of
all positives evenly, and of a box that falls to several the parts are added up in their order. That of prototypes is one over
the positives that cover a pixel, and belongs to one program. Nothing depends on the order of programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import cross_entropy_with_logits, rounded, scalar, sigmoid
from .fill import fill
from .launch import INTERPRETED
from .reduce import total
from .rows import load_row_boxes


def pixel_sizes(num_channels: int, num_pixels: int, numbers: int) -> dict[str, int]:
    """Channels and pixels of a tile of so many ``numbers``, and warps.

    More numbers a thread would take more than 128 registers: addresses are as many, and twice as long.
    """
    channels = triton.next_power_of_2(num_channels)
    if INTERPRETED:
        numbers = min(channels * triton.next_power_of_2(num_pixels), 2**18)
    return {"CHANNELS": channels, "PIXELS": max(numbers // channels, 16), "num_warps": 4}


class Tensor4(NamedTuple):
    """A tensor (B, M, h, w) of any layout."""

    ptr: Any
    image: int
    channel: int
    row: int
    column: int


class Truth(NamedTuple):
    """Boxes (N, 4) of rows in pixels of the image; masks (B, h, w) with the number (N,) of every row, or (N, h, w)."""

    box_ptr: Any
    mask_ptr: Any
    mask_image: int
    mask_row: int
    mask_column: int
    number_ptr: Any


class Positives(NamedTuple):
    """Of every image the anchors (B, A) of positives whose boxes have pixels, in order, of which there are ``count`` (B,).

    ``pixels`` (B, A) int64 are x1, y1, x2, y2 with 16 bits each, ``weight`` (B, A) is 1 over the area of the box. Before the
    tiles of its pixels come ``first`` (B, A) int64 of others, and all have ``tiles`` (B,) int64.
    """

    anchor_ptr: Any
    count_ptr: Any
    pixels_ptr: Any
    weight_ptr: Any
    first_ptr: Any
    tiles_ptr: Any


class Parts(NamedTuple):
    """Sums (B, programs, 2, CHANNELS) over pixels, of the positive that a program goes on with and of the one that it leaves to
    the next: its place (B, programs) in the list, -1 for none.
    """

    sum_ptr: Any
    nth_ptr: Any


class Sizes(NamedTuple):
    """Anchors, channels; height and width of a mask."""

    A: int
    M: int
    height: int
    width: int


class Positive(NamedTuple):
    """Anchor, row, weight, and pixels; the last of either axis is not in the box any more."""

    anchor: Any
    row: Any
    weight: Any
    x1: Any
    y1: Any
    x2: Any
    y2: Any


class Tile(NamedTuple):
    """Pixels [n]: whether they count, and where they lie."""

    mask: Any
    x: Any
    y: Any


# ---- tiles


@triton.jit
def _edge(value, pixels_a_px, size, DTYPE: tl.constexpr):
    """The first pixel [n] that is not below an edge of a box, inside an axis of ``size``."""
    return tl.minimum(tl.maximum(tl.ceil(value * scalar(pixels_a_px, DTYPE)), 0.0), size.to(DTYPE)).to(tl.int64)


@triton.jit
def _unpack(pixels):
    """x1, y1, x2, y2 [...] of packed pixels."""
    x1, y1 = (pixels & 0xFFFF).to(tl.int32), ((pixels >> 16) & 0xFFFF).to(tl.int32)
    return x1, y1, ((pixels >> 32) & 0xFFFF).to(tl.int32), ((pixels >> 48) & 0xFFFF).to(tl.int32)


@triton.jit
def _load_positive(positives, row_ptr, image, nth, A):
    slot = image * A + nth
    anchor = tl.load(positives.anchor_ptr + slot)
    x1, y1, x2, y2 = _unpack(tl.load(positives.pixels_ptr + slot))
    return Positive(anchor, tl.load(row_ptr + image * A + anchor), tl.load(positives.weight_ptr + slot), x1, y1, x2, y2)


@triton.jit
def _load_coefficients(coefficients, image, anchor, M, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """Coefficients [CHANNELS] of an anchor."""
    m = tl.arange(0, CHANNELS)
    ptr = coefficients.ptr + image * coefficients.image + anchor.to(tl.int64) * coefficients.anchor
    return tl.load(ptr + m.to(tl.int64) * coefficients.channel, mask=m < M, other=0.0).to(DTYPE)


@triton.jit
def _prototype_places(prototypes, image, tile, CHANNELS: tl.constexpr):
    """Addresses [CHANNELS, n] of the prototypes at pixels."""
    m = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    place = tile.y.to(tl.int64) * prototypes.row + tile.x.to(tl.int64) * prototypes.column
    return prototypes.ptr + image * prototypes.image + m * prototypes.channel + place[None, :]


@triton.jit
def _load_prototypes(prototypes, image, tile, M, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    mask = tile.mask[None, :] & (tl.arange(0, CHANNELS)[:, None] < M)
    return tl.load(_prototype_places(prototypes, image, tile, CHANNELS), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _load_mask(truth, image, row, tile, OVERLAP: tl.constexpr, DTYPE: tl.constexpr):
    """What the pixels of a tile hold: numbers of rows, or a mask."""
    of = image if OVERLAP else row.to(tl.int64)
    place = tile.y.to(tl.int64) * truth.mask_row + tile.x.to(tl.int64) * truth.mask_column
    return tl.load(truth.mask_ptr + of * truth.mask_image + place, mask=tile.mask, other=0).to(DTYPE)


@triton.jit
def _target(truth, held, row, OVERLAP: tl.constexpr, DTYPE: tl.constexpr):
    """The mask [n] of a row, from what the pixels hold."""
    target = held
    if OVERLAP:
        target = tl.where(held == tl.load(truth.number_ptr + row).to(DTYPE), 1.0, 0.0).to(DTYPE)
    return target


@triton.jit
def _last_begun(first_ptr, count, tile):
    """The last of ``count`` positives that begins with ``tile`` or before."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        has_begun = tl.load(first_ptr + middle) <= tile
        low = tl.where(has_begun, middle, low)
        high = tl.where(has_begun, high, middle)
    return low


@triton.jit
def _store_slope(grad, slope, scale_ptr, image, positive, mask, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient [CHANNELS] of a positive's coefficients, from the sum over its pixels."""
    m = tl.arange(0, CHANNELS).to(tl.int64)
    ptr = grad.ptr + image * grad.image + positive.anchor.to(tl.int64) * grad.anchor + m * grad.channel
    slope = slope * (positive.weight * tl.load(scale_ptr).to(DTYPE))
    tl.store(ptr, rounded(slope, grad.ptr.dtype.element_ty), mask=mask)


# ---- kernels


@triton.jit(do_not_specialize=["count"])
def _mask_list_kernel(
    positives, grad_ptr, poison_ptr, row_ptr, truth, sizes, along_x: tl.float64, along_y: tl.float64, B, count,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program an image lists its positives, which have tiles of PIXELS pixels.

    All together fill the gradient of coefficients, if there is one.
    """
    image = tl.program_id(0).to(tl.int64)
    if image == 0:
        tl.store(poison_ptr, tl.zeros((), DTYPE))
    if image < B:
        listed, start, tiles = 0, 0, tl.zeros((), tl.int64)
        while start < sizes.A:
            anchor = start + tl.arange(0, BLOCK)
            row = tl.load(row_ptr + image * sizes.A + anchor, mask=anchor < sizes.A, other=-1)
            box = load_row_boxes(truth.box_ptr, 4, 1, tl.where(row >= 0, row, 0), row >= 0, DTYPE)
            x1, x2 = _edge(box.x1, along_x, sizes.width, DTYPE), _edge(box.x2, along_x, sizes.width, DTYPE)
            y1, y2 = _edge(box.y1, along_y, sizes.height, DTYPE), _edge(box.y2, along_y, sizes.height, DTYPE)
            area = (box.x2 - box.x1) * scalar(along_x, DTYPE) * ((box.y2 - box.y1) * scalar(along_y, DTYPE))
            has_pixels = (row >= 0) & (x1 < x2) & (y1 < y2)
            number = has_pixels.to(tl.int32)
            slot = image * sizes.A + listed + tl.cumsum(number, 0) - number
            tl.store(positives.anchor_ptr + slot, anchor, mask=has_pixels)
            tl.store(positives.pixels_ptr + slot, x1 | (y1 << 16) | (x2 << 32) | (y2 << 48), mask=has_pixels)
            tl.store(positives.weight_ptr + slot, 1 / area, mask=has_pixels)
            of_box = tl.where(has_pixels, tl.cdiv((x2 - x1) * (y2 - y1), PIXELS), 0)
            tl.store(positives.first_ptr + slot, tiles + tl.cumsum(of_box, 0) - of_box, mask=has_pixels)
            tiles += tl.sum(of_box, 0)
            listed += tl.sum(number, 0)
            start += BLOCK
        tl.store(positives.count_ptr + image, listed)
        tl.store(positives.tiles_ptr + image, tiles)
    if grad_ptr is not None:
        fill(grad_ptr, 0.0, count, tl.program_id(0), tl.num_programs(0), BLOCK)


@triton.jit
def _mask_positive_kernel(
    partial_ptr, poison_ptr, grad, parts, coefficients, prototypes, positives, row_ptr, truth, scale_ptr, sizes,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes its share of the tiles of an image's positives, as many as others.

    It writes their loss to ``partial`` (programs,), the gradient of coefficients whose tiles it all has, and ``parts``.
    """
    image, part, m = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, CHANNELS)
    slot = tl.program_id(1) * tl.num_programs(0) + part
    tiles, count = tl.load(positives.tiles_ptr + image), tl.load(positives.count_ptr + image)
    programs = tl.maximum(tl.minimum(tiles, tl.num_programs(0)), 1)  # which have a tile
    tile_nth, end = tiles * part // programs, tl.minimum(tiles * (part + 1) // programs, tiles)
    nth = _last_begun(positives.first_ptr + image * sizes.A, count, tile_nth)
    loss, left = tl.zeros((PIXELS,), DTYPE), -1
    while tile_nth < end:
        positive = _load_positive(positives, row_ptr, image, nth, sizes.A)
        coefficient = _load_coefficients(coefficients, image, positive.anchor, sizes.M, CHANNELS, DTYPE)
        slope = tl.zeros((CHANNELS, PIXELS), DTYPE)
        width, first = positive.x2 - positive.x1, tl.load(positives.first_ptr + image * sizes.A + nth)
        size, begin = width * (positive.y2 - positive.y1), ((tile_nth - first) * PIXELS).to(tl.int32)
        start, stop = begin, tl.minimum((end - first) * PIXELS, size).to(tl.int32)
        while start < stop:
            pixel = start + tl.arange(0, PIXELS)
            y = pixel // width
            tile = Tile(pixel < size, positive.x1 + pixel - y * width, positive.y1 + y)
            prototype = _load_prototypes(prototypes, image, tile, sizes.M, CHANNELS, DTYPE)
            logit = tl.sum(prototype * coefficient[:, None], 0)
            held = _load_mask(truth, image, positive.row, tile, OVERLAP, DTYPE)
            target = _target(truth, held, positive.row, OVERLAP, DTYPE)
            loss += tl.where(tile.mask, cross_entropy_with_logits(logit, target), 0.0) * positive.weight
            if grad is not None:
                slope += prototype * tl.where(tile.mask, sigmoid(logit) - target, 0.0)[None, :]
            start += PIXELS
        if grad is not None:
            slope, is_whole = tl.sum(slope, 1), (begin == 0) & (stop == size)
            _store_slope(grad, slope, scale_ptr, image, positive, is_whole & (m < sizes.M), CHANNELS, DTYPE)
            is_left = (begin == 0) & (stop < size)
            left = tl.where(is_left, nth, left)
            ptr = parts.sum_ptr + (2 * slot + is_left.to(tl.int32)).to(tl.int64) * CHANNELS
            tl.store(ptr + m, slope, mask=(m >= 0) & (is_whole == 0))
        tile_nth = first + tl.cdiv(size, PIXELS)
        nth += 1
    if grad is not None:
        tl.store(parts.nth_ptr + slot, left)
    loss = tl.sum(loss)
    tl.store(partial_ptr + slot, loss)
    tl.atomic_add(poison_ptr, loss, mask=loss != loss, sem="relaxed")


@triton.jit
def _mask_merge_kernel(
    grad, parts, positives, row_ptr, scale_ptr, sizes, DTYPE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr
):
    """A program adds up what others have of the positive that it left to them, and writes the gradient of its coefficients."""
    image, part, m = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, CHANNELS)
    ptr = parts.sum_ptr + (image * tl.num_programs(0) + part) * 2 * CHANNELS + m
    nth = tl.load(parts.nth_ptr + image * tl.num_programs(0) + part)
    if nth >= 0:
        positive = _load_positive(positives, row_ptr, image, nth, sizes.A)
        size = (positive.x2 - positive.x1) * (positive.y2 - positive.y1)
        end = tl.load(positives.first_ptr + image * sizes.A + nth) + tl.cdiv(size, PIXELS)
        tiles = tl.load(positives.tiles_ptr + image)
        programs = tl.minimum(tiles, tl.num_programs(0))
        slope = tl.load(ptr + CHANNELS)
        part += 1
        while tiles * part // programs < end:
            ptr += 2 * CHANNELS
            slope += tl.load(ptr)
            part += 1
        _store_slope(grad, slope, scale_ptr, image, positive, m < sizes.M, CHANNELS, DTYPE)


@triton.jit
def _mask_prototype_kernel(
    grad, coefficients, prototypes, positives, row_ptr, truth, scale_ptr, poison_ptr, sizes,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of an image, looks for the positives that cover some of it, LISTED at once, and takes one by one.

    It writes the prototypes' gradient of its tile.
    """
    image, n = tl.program_id(1).to(tl.int64), tl.arange(0, PIXELS)
    across = tl.cdiv(sizes.width, COLUMNS)
    left = tl.program_id(0) % across * COLUMNS
    top = tl.program_id(0) // across * (PIXELS // COLUMNS)
    x, y = left + n % COLUMNS, top + n // COLUMNS
    tile = Tile((x < sizes.width) & (y < sizes.height), x, y)
    prototype = _load_prototypes(prototypes, image, tile, sizes.M, CHANNELS, DTYPE)
    held = tl.zeros((PIXELS,), DTYPE)
    if OVERLAP:
        held = _load_mask(truth, image, 0, tile, OVERLAP, DTYPE)
    slope = tl.zeros((CHANNELS, PIXELS), DTYPE)
    count, start = tl.load(positives.count_ptr + image), 0
    while start < count:
        listed = start + tl.arange(0, LISTED)
        pixels = tl.load(positives.pixels_ptr + image * sizes.A + listed, mask=listed < count, other=0)
        x1, y1, x2, y2 = _unpack(pixels)
        is_here = (x1 < left + COLUMNS) & (x2 > left) & (y1 < top + PIXELS // COLUMNS) & (y2 > top)
        nth = tl.min(tl.where(is_here, listed, count), 0)
        while nth < count:
            positive = _load_positive(positives, row_ptr, image, nth, sizes.A)
            inside = (x >= positive.x1) & (x < positive.x2) & (y >= positive.y1) & (y < positive.y2)
            coefficient = _load_coefficients(coefficients, image, positive.anchor, sizes.M, CHANNELS, DTYPE)
            logit = tl.sum(prototype * coefficient[:, None], 0)
            if not OVERLAP:
                held = _load_mask(truth, image, positive.row, Tile(inside, x, y), OVERLAP, DTYPE)
            error = sigmoid(logit) - _target(truth, held, positive.row, OVERLAP, DTYPE)
            slope += coefficient[:, None] * tl.where(inside, error * positive.weight, 0.0)[None, :]
            nth = tl.min(tl.where(is_here & (listed > nth), listed, count), 0)
        start += LISTED
    slope = slope * (tl.load(scale_ptr).to(DTYPE) + tl.load(poison_ptr))
    mask = tile.mask[None, :] & (tl.arange(0, CHANNELS)[:, None] < sizes.M)
    tl.store(_prototype_places(grad, image, tile, CHANNELS), rounded(slope, grad.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs", "count"])
def _mask_total_kernel(
    loss_ptr, grad_ptr, partial_ptr, scale_ptr, poison_ptr, programs, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """The first program writes the loss. Where that is no number all together make the coefficients' gradient NaN."""
    scale = tl.load(scale_ptr).to(DTYPE)
    poison = tl.load(poison_ptr) + scale
    if grad_ptr is not None:
        num_broken = (poison != poison).to(tl.int64)
        fill(grad_ptr, float("nan"), num_broken * count, tl.program_id(0), tl.num_programs(0), BLOCK)
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, total(partial_ptr, programs, DTYPE, BLOCK) * scale)
