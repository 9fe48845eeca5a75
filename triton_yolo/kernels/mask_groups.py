"""Positives of an image in groups that share a row, and with it box, pixels and mask: what the mask term works on.

They are listed in the order of their anchors, sorted by row and cut into groups. Nothing depends on the order of programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import scalar
from .fill import fill
from .rows import load_row_boxes

GROUP: tl.constexpr = tl.constexpr(16)


class Truth(NamedTuple):
    """Boxes (N, 4) of rows in pixels of the image; masks (B, h, w) with the number (N,) of every row, or (N, h, w)."""

    box_ptr: Any
    mask_ptr: Any
    mask_image: int
    mask_row: int
    mask_column: int
    number_ptr: Any


class Listed(NamedTuple):
    """Of every image anchors and rows (B, A) of positives whose boxes have pixels, in order: ``count`` (B,) of them."""

    anchor_ptr: Any
    row_ptr: Any
    count_ptr: Any


class Groups(NamedTuple):
    """Of every image the listed anchors (B, A) sorted by row, and how many of the same row come before each.

    Groups, of which there are ``count`` (B,), ``start`` (B, A + 1) at a place in that order, and have a row (B, A), a
    ``weight`` (B, A), 1 over the area of its box, and ``pixels`` (B, A) int64, x1, y1, x2, y2 with 16 bits each. Before the
    tiles of its pixels come ``first`` (B, A) int64 of others, and all have ``tiles`` (B,) int64.
    """

    anchor_ptr: Any
    nth_ptr: Any
    start_ptr: Any
    row_ptr: Any
    weight_ptr: Any
    pixels_ptr: Any
    first_ptr: Any
    count_ptr: Any
    tiles_ptr: Any


class Sizes(NamedTuple):
    """Anchors, channels; height and width of a mask."""

    A: int
    M: int
    height: int
    width: int


class Group(NamedTuple):
    """Anchors [GROUP] and whether they exist; row, weight, pixels; the last of either axis is not in the box any more."""

    anchor: Any
    exists: Any
    row: Any
    weight: Any
    x1: Any
    y1: Any
    x2: Any
    y2: Any


@triton.jit
def _edge(value, pixels_a_px, size, DTYPE: tl.constexpr):
    """The first pixel [n] that is not below an edge of a box, inside an axis of ``size``."""
    return tl.minimum(tl.maximum(tl.ceil(value * scalar(pixels_a_px, DTYPE)), 0.0), size.to(DTYPE)).to(tl.int64)


@triton.jit
def _pack_pixels(truth, row, mask, sizes, along_x, along_y, DTYPE: tl.constexpr):
    """Packed pixels [n] of the boxes of rows [n], how many there are, and 1 over the area."""
    box = load_row_boxes(truth.box_ptr, 4, 1, tl.where(mask, row, 0), mask, DTYPE)
    x1, x2 = _edge(box.x1, along_x, sizes.width, DTYPE), _edge(box.x2, along_x, sizes.width, DTYPE)
    y1, y2 = _edge(box.y1, along_y, sizes.height, DTYPE), _edge(box.y2, along_y, sizes.height, DTYPE)
    area = (box.x2 - box.x1) * scalar(along_x, DTYPE) * ((box.y2 - box.y1) * scalar(along_y, DTYPE))
    size = tl.where(mask & (x1 < x2) & (y1 < y2), (x2 - x1) * (y2 - y1), 0)
    return x1 | (y1 << 16) | (x2 << 32) | (y2 << 48), size, 1 / area


@triton.jit
def unpack_pixels(pixels):
    """x1, y1, x2, y2 [...] of packed pixels."""
    x1, y1 = (pixels & 0xFFFF).to(tl.int32), ((pixels >> 16) & 0xFFFF).to(tl.int32)
    return x1, y1, ((pixels >> 32) & 0xFFFF).to(tl.int32), ((pixels >> 48) & 0xFFFF).to(tl.int32)


@triton.jit
def load_group(groups, image, nth, A):
    slot, start_ptr = image * A + nth, groups.start_ptr + image * (A + 1) + nth
    member = tl.load(start_ptr) + tl.arange(0, GROUP)
    exists = member < tl.load(start_ptr + 1)
    anchor = tl.load(groups.anchor_ptr + image * A + member, mask=exists, other=0)
    x1, y1, x2, y2 = unpack_pixels(tl.load(groups.pixels_ptr + slot))
    return Group(anchor, exists, tl.load(groups.row_ptr + slot), tl.load(groups.weight_ptr + slot), x1, y1, x2, y2)


@triton.jit(do_not_specialize=["count"])
def _mask_list_kernel(
    listed, grad_ptr, poison_ptr, row_ptr, truth, sizes, along_x: tl.float64, along_y: tl.float64, B, count,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an image lists its positives. All together fill the gradient of coefficients, if there is one."""
    image = tl.program_id(0).to(tl.int64)
    if image == 0:
        tl.store(poison_ptr, tl.zeros((), DTYPE))
    if image < B:
        num_listed, start = 0, 0
        while start < sizes.A:
            anchor = start + tl.arange(0, BLOCK)
            row = tl.load(row_ptr + image * sizes.A + anchor, mask=anchor < sizes.A, other=-1)
            has_pixels = _pack_pixels(truth, row, row >= 0, sizes, along_x, along_y, DTYPE)[1] > 0
            number = has_pixels.to(tl.int32)
            slot = image * sizes.A + num_listed + tl.cumsum(number, 0) - number
            tl.store(listed.anchor_ptr + slot, anchor, mask=has_pixels)
            tl.store(listed.row_ptr + slot, row, mask=has_pixels)
            num_listed += tl.sum(number, 0)
            start += BLOCK
        tl.store(listed.count_ptr + image, num_listed)
    if grad_ptr is not None:
        fill(grad_ptr, 0.0, count, tl.program_id(0), tl.num_programs(0), BLOCK)


@triton.jit
def _mask_sort_kernel(groups, listed, A, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """Programs of an image sort its listed positives by row, BLOCK at once: each counts those that come before it."""
    image = tl.program_id(1).to(tl.int64)
    count, start = tl.load(listed.count_ptr + image), tl.program_id(0) * BLOCK
    while start < count:
        nth = start + tl.arange(0, BLOCK)
        row = tl.load(listed.row_ptr + image * A + nth, mask=nth < count, other=-1)
        below, before = tl.zeros((BLOCK, OTHERS), tl.int32), tl.zeros((BLOCK, OTHERS), tl.int32)
        other = tl.arange(0, OTHERS)
        while tl.min(other, 0) < count:
            other_row = tl.load(listed.row_ptr + image * A + other, mask=other < count, other=2**31 - 1)
            below += (other_row[None, :] < row[:, None]).to(tl.int32)
            before += ((other_row[None, :] == row[:, None]) & (other[None, :] < nth[:, None])).to(tl.int32)
            other += OTHERS
        of_row = tl.sum(before, 1)
        slot = image * A + tl.sum(below, 1) + of_row
        anchor = tl.load(listed.anchor_ptr + image * A + nth, mask=nth < count, other=0)
        tl.store(groups.anchor_ptr + slot, anchor, mask=nth < count)
        tl.store(groups.nth_ptr + slot, of_row, mask=nth < count)
        start += tl.num_programs(0) * BLOCK


@triton.jit
def _mask_group_kernel(
    groups, listed, row_ptr, truth, sizes, along_x: tl.float64, along_y: tl.float64,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program an image cuts its sorted positives into groups, which have tiles of PIXELS pixels."""
    image = tl.program_id(0).to(tl.int64)
    count, start = tl.load(listed.count_ptr + image), 0
    num_groups, tiles = 0, tl.zeros((), tl.int64)
    start_ptr = groups.start_ptr + image * (sizes.A + 1)
    while start < count:
        member = start + tl.arange(0, BLOCK)
        nth = tl.load(groups.nth_ptr + image * sizes.A + member, mask=member < count, other=1)
        begins = nth % GROUP == 0
        anchor = tl.load(groups.anchor_ptr + image * sizes.A + member, mask=begins, other=0)
        row = tl.load(row_ptr + image * sizes.A + anchor, mask=begins, other=0)
        pixels, size, weight = _pack_pixels(truth, row, begins, sizes, along_x, along_y, DTYPE)
        number, of_group = begins.to(tl.int32), tl.cdiv(size, PIXELS)
        place = num_groups + tl.cumsum(number, 0) - number
        slot = image * sizes.A + place
        tl.store(start_ptr + place, member, mask=begins)
        tl.store(groups.row_ptr + slot, row, mask=begins)
        tl.store(groups.weight_ptr + slot, weight, mask=begins)
        tl.store(groups.pixels_ptr + slot, pixels, mask=begins)
        tl.store(groups.first_ptr + slot, tiles + tl.cumsum(of_group, 0) - of_group, mask=begins)
        tiles += tl.sum(of_group, 0)
        num_groups += tl.sum(number, 0)
        start += BLOCK
    tl.store(start_ptr + num_groups, count)
    tl.store(groups.count_ptr + image, num_groups)
    tl.store(groups.tiles_ptr + image, tiles)
