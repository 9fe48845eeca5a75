"""The mask term of instance segmentation: cross entropy of positives' masks inside their targets' boxes, and its gradients.

Logits are worked out where they are needed, of a group of positives in a tile of pixels at a time, and kept nowhere. The
gradient of coefficients is a sum over the pixels of a box: programs share all tiles of all groups evenly, and of a group that
falls to several the parts are added up in their order. That of prototypes is one over the positives that cover a pixel, and
belongs to one program. Nothing depends on the order of programs.

Sums over channels, pixels and positives are products of matrices in the type that all is computed in. What does not count is 0
in their factors, so that no NaN beside a box gets into them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import cross_entropy_with_logits, rounded, sigmoid_of, split_sigmoid
from .fill import fill
from .launch import INTERPRETED
from .mask_groups import GROUP, load_group, unpack_pixels
from .reduce import total


def pixel_sizes(num_channels: int, num_pixels: int, numbers: int, num_warps: int) -> dict[str, int]:
    """Channels and pixels of a tile of so many ``numbers``, and warps."""
    channels = max(triton.next_power_of_2(num_channels), 16)
    if INTERPRETED:
        numbers = min(channels * triton.next_power_of_2(num_pixels), 2**18)
    return {"CHANNELS": channels, "PIXELS": max(numbers // channels, 16), "num_warps": num_warps}


class Tensor4(NamedTuple):
    """A tensor (B, M, h, w) of any layout."""

    ptr: Any
    image: int
    channel: int
    row: int
    column: int


class Parts(NamedTuple):
    """Sums (B, programs, 2, GROUP, CHANNELS) over pixels, of the group that a program goes on with and of the one that it
    leaves to the next: its place (B, programs) in the list, -1 for none.
    """

    sum_ptr: Any
    nth_ptr: Any


class Tile(NamedTuple):
    """Pixels [n]: whether they count, and where they lie."""

    mask: Any
    x: Any
    y: Any


# ---- tiles


@triton.jit
def _coefficient_places(coefficients, image, group, CHANNELS: tl.constexpr, OFFSET: tl.constexpr):
    """Addresses [GROUP, CHANNELS] of the coefficients of a group."""
    place = group.anchor.to(OFFSET)[:, None] * coefficients.anchor
    place += tl.arange(0, CHANNELS).to(OFFSET)[None, :] * coefficients.channel
    return coefficients.ptr + image * coefficients.image + place


@triton.jit
def _load_coefficients(coefficients, image, group, M, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    mask = group.exists[:, None] & (tl.arange(0, CHANNELS)[None, :] < M)
    return tl.load(_coefficient_places(coefficients, image, group, CHANNELS, OFFSET), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _prototype_places(prototypes, image, tile, CHANNELS: tl.constexpr, OFFSET: tl.constexpr):
    """Addresses [CHANNELS, n] of the prototypes at pixels."""
    place = tile.y.to(OFFSET) * prototypes.row + tile.x.to(OFFSET) * prototypes.column
    channel = tl.arange(0, CHANNELS).to(OFFSET)[:, None] * prototypes.channel
    return prototypes.ptr + image * prototypes.image + (channel + place[None, :])


@triton.jit
def _load_prototypes(prototypes, image, tile, M, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    mask = tile.mask[None, :] & (tl.arange(0, CHANNELS)[:, None] < M)
    return tl.load(_prototype_places(prototypes, image, tile, CHANNELS, OFFSET), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _load_mask(truth, image, row, tile, OVERLAP: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """What the pixels of a tile hold: numbers of rows, or a mask."""
    of = image if OVERLAP else row.to(tl.int64)
    place = tile.y.to(OFFSET) * truth.mask_row + tile.x.to(OFFSET) * truth.mask_column
    return tl.load(truth.mask_ptr + of * truth.mask_image + place, mask=tile.mask, other=0).to(DTYPE)


@triton.jit
def _target(held, number, OVERLAP: tl.constexpr, DTYPE: tl.constexpr):
    """The mask [1, n] of a row, from what the pixels hold."""
    target = held
    if OVERLAP:
        target = tl.where(held == number.to(DTYPE), 1.0, 0.0).to(DTYPE)
    return target[None, :]


@triton.jit
def _add_product(total, a, b):
    """A sum of products of matrices, without tensor cores of fewer digits."""
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _error(logit, target, counts, DTYPE: tl.constexpr):
    """The slope of the cross entropy, 0 where it does not count."""
    is_up, e = split_sigmoid(logit)
    return tl.where(counts, sigmoid_of(is_up, e, DTYPE) - target, 0.0)


@triton.jit
def _last_begun(first_ptr, count, tile):
    """The last of ``count`` groups that begins with ``tile`` or before."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        has_begun = tl.load(first_ptr + middle) <= tile
        low = tl.where(has_begun, middle, low)
        high = tl.where(has_begun, high, middle)
    return low


@triton.jit
def _programs(tiles, num_programs):
    """How many of so many programs share the tiles of an image. Few tiles are not worth a part, which others add up."""
    return tl.maximum(tl.minimum(tiles // 4, num_programs), 1)


@triton.jit
def _part_places(CHANNELS: tl.constexpr):
    return tl.arange(0, GROUP)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _store_slope(
    grad, slope, scale_ptr, image, group, is_whole, M, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr
):
    """The gradient [GROUP, CHANNELS] of a group's coefficients, from sums over all pixels."""
    slope = slope * (group.weight * tl.load(scale_ptr).to(DTYPE))
    # As a number of channels: Triton 3.9's interpreter makes integers of a truth value that is spread over a tile.
    mask = group.exists[:, None] & (tl.arange(0, CHANNELS)[None, :] < tl.where(is_whole, M, 0))
    ptr = _coefficient_places(grad, image, group, CHANNELS, OFFSET)
    tl.store(ptr, rounded(slope, grad.ptr.dtype.element_ty), mask=mask)


# ---- kernels


@triton.jit
def _mask_positive_kernel(
    partial_ptr, poison_ptr, grad, parts, coefficients, prototypes, groups, truth, scale_ptr, sizes, OVERLAP: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes its share of the tiles of an image's groups, as many as others.

    It writes their loss to ``partial`` (programs,), the gradient of coefficients whose tiles it all has, and ``parts``.
    """
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot = tl.program_id(1) * tl.num_programs(0) + part
    tiles, count = tl.load(groups.tiles_ptr + image), tl.load(groups.count_ptr + image)
    programs = _programs(tiles, tl.num_programs(0))  # which have a tile
    tile_nth, end = tiles * part // programs, tl.minimum(tiles * (part + 1) // programs, tiles)
    nth = _last_begun(groups.first_ptr + image * sizes.A, count, tile_nth)
    loss, left = tl.zeros((GROUP, PIXELS), DTYPE), -1
    while tile_nth < end:
        group = load_group(groups, image, nth, sizes.A)
        number = tl.load(truth.number_ptr + group.row)
        coefficient = _load_coefficients(coefficients, image, group, sizes.M, CHANNELS, OFFSET, DTYPE)
        slope = tl.zeros((GROUP, CHANNELS), DTYPE)
        width, first = group.x2 - group.x1, tl.load(groups.first_ptr + image * sizes.A + nth)
        size, begin = width * (group.y2 - group.y1), ((tile_nth - first) * PIXELS).to(tl.int32)
        start, stop = begin, tl.minimum((end - first) * PIXELS, size).to(tl.int32)
        while start < stop:
            pixel = start + tl.arange(0, PIXELS)
            y = pixel // width
            tile = Tile(pixel < size, group.x1 + pixel - y * width, group.y1 + y)
            prototype = _load_prototypes(prototypes, image, tile, sizes.M, CHANNELS, OFFSET, DTYPE)
            held = _load_mask(truth, image, group.row, tile, OVERLAP, OFFSET, DTYPE)
            target, counts = _target(held, number, OVERLAP, DTYPE), group.exists[:, None] & tile.mask[None, :]
            factor = tl.where(start >= 0, coefficient, 0.0)  # always; but in no registers from tile to tile
            logit = _add_product(tl.zeros((GROUP, PIXELS), DTYPE), factor, prototype)
            loss += tl.where(counts, cross_entropy_with_logits(logit, target), 0.0) * group.weight
            if grad is not None:
                slope = _add_product(slope, _error(logit, target, counts, DTYPE), tl.trans(prototype))
            start += PIXELS
        if grad is not None:
            is_whole, is_left = (begin == 0) & (stop == size), (begin == 0) & (stop < size)
            _store_slope(grad, slope, scale_ptr, image, group, is_whole, sizes.M, CHANNELS, OFFSET, DTYPE)
            left = tl.where(is_left, nth, left)
            ptr = parts.sum_ptr + (2 * slot + is_left.to(tl.int32)).to(tl.int64) * (GROUP * CHANNELS)
            place = _part_places(CHANNELS)
            tl.store(ptr + place, slope, mask=place < tl.where(is_whole, 0, GROUP * CHANNELS))
        tile_nth = first + tl.cdiv(size, PIXELS)
        nth += 1
    if grad is not None:
        tl.store(parts.nth_ptr + slot, left)
    loss = tl.sum(loss)
    tl.store(partial_ptr + slot, loss)
    tl.atomic_add(poison_ptr, loss, mask=loss != loss, sem="relaxed")


@triton.jit
def _mask_merge_kernel(
    grad, parts, groups, scale_ptr, sizes,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program adds up what others have of the group that it left to them, and writes the gradient of its coefficients."""
    SUM: tl.constexpr = GROUP * CHANNELS
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    nth = tl.load(parts.nth_ptr + image * tl.num_programs(0) + part)
    if nth >= 0:
        group = load_group(groups, image, nth, sizes.A)
        size = (group.x2 - group.x1) * (group.y2 - group.y1)
        end = tl.load(groups.first_ptr + image * sizes.A + nth) + tl.cdiv(size, PIXELS)
        tiles = tl.load(groups.tiles_ptr + image)
        programs = _programs(tiles, tl.num_programs(0))
        ptr = parts.sum_ptr + (image * tl.num_programs(0) + part) * (2 * SUM) + _part_places(CHANNELS)
        slope = tl.load(ptr + SUM)
        part += 1
        while tiles * part // programs < end:
            ptr += 2 * SUM
            slope += tl.load(ptr)
            part += 1
        _store_slope(grad, slope, scale_ptr, image, group, nth >= 0, sizes.M, CHANNELS, OFFSET, DTYPE)


@triton.jit
def _mask_prototype_kernel(
    grad, coefficients, prototypes, groups, truth, scale_ptr, poison_ptr, sizes,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of an image, looks for the groups that cover some of it, LISTED at once, and takes one by one.

    It writes the prototypes' gradient of its tile.
    """
    image, n = tl.program_id(1).to(tl.int64), tl.arange(0, PIXELS)
    across = tl.cdiv(sizes.width, COLUMNS)
    left = tl.program_id(0) % across * COLUMNS
    top = tl.program_id(0) // across * (PIXELS // COLUMNS)
    x, y = left + n % COLUMNS, top + n // COLUMNS
    tile = Tile((x < sizes.width) & (y < sizes.height), x, y)
    prototype = _load_prototypes(prototypes, image, tile, sizes.M, CHANNELS, OFFSET, DTYPE)
    held = tl.zeros((PIXELS,), DTYPE)
    if OVERLAP:
        held = _load_mask(truth, image, 0, tile, OVERLAP, OFFSET, DTYPE)
    slope = tl.zeros((CHANNELS, PIXELS), DTYPE)
    count, start = tl.load(groups.count_ptr + image), 0
    while start < count:
        listed = start + tl.arange(0, LISTED)
        pixels = tl.load(groups.pixels_ptr + image * sizes.A + listed, mask=listed < count, other=0)
        x1, y1, x2, y2 = unpack_pixels(pixels)
        is_here = (x1 < left + COLUMNS) & (x2 > left) & (y1 < top + PIXELS // COLUMNS) & (y2 > top)
        nth = tl.min(tl.where(is_here, listed, count), 0)
        while nth < count:
            group = load_group(groups, image, nth, sizes.A)
            number = tl.load(truth.number_ptr + group.row)
            inside = (x >= group.x1) & (x < group.x2) & (y >= group.y1) & (y < group.y2)
            coefficient = _load_coefficients(coefficients, image, group, sizes.M, CHANNELS, OFFSET, DTYPE)
            if not OVERLAP:
                held = _load_mask(truth, image, group.row, Tile(inside, x, y), OVERLAP, OFFSET, DTYPE)
            target, counts = _target(held, number, OVERLAP, DTYPE), group.exists[:, None] & inside[None, :]
            logit = _add_product(tl.zeros((GROUP, PIXELS), DTYPE), coefficient, prototype)
            error = _error(logit, target, counts, DTYPE) * group.weight
            slope = _add_product(slope, tl.trans(coefficient), error)
            nth = tl.min(tl.where(is_here & (listed > nth), listed, count), 0)
        start += LISTED
    slope = slope * (tl.load(scale_ptr).to(DTYPE) + tl.load(poison_ptr))
    mask = tile.mask[None, :] & (tl.arange(0, CHANNELS)[:, None] < sizes.M)
    ptr = _prototype_places(grad, image, tile, CHANNELS, OFFSET)
    tl.store(ptr, rounded(slope, grad.ptr.dtype.element_ty), mask=mask)


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
