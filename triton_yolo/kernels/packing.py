"""Ground truth as it came: which rows count, and their boxes in pixels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import box_rows, scalar
from .oriented import Oriented
from .pairs import walk_cells
from .rows import Box, load_oriented_rows, load_row_boxes


class Pack(NamedTuple):
    """Constants of ``pack_rows``: classes, whether targets are raw rows, whether to give centre and size, rows at a time.

    ``IS_ORIENTED``: boxes have an angle and, if they count, no side below ``MIN_SIDE``.
    """

    C: int
    IS_RAW: bool
    HAS_XYWH: bool
    BLOCK: int
    IS_ORIENTED: bool = False
    MIN_SIDE: float = 0.0


class Target(NamedTuple):
    """Rows [n] as they came: image, -1 where it or the label is no whole number, label, box as corners, and centre and size.

    The latter are ``Oriented``, with an angle if there is one.
    """

    image: Any
    label: Any
    xyxy: Box
    xywh: Oriented


@triton.jit
def _load_raw_rows(targets, height, width, offs, mask, IS_ORIENTED: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of (image index, class, cx, cy, w, h) in shares of the image, and the angle."""
    ptr = targets.ptr + offs.to(tl.int64) * targets.row
    image_value = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    label_value = tl.load(ptr + targets.column, mask=mask, other=0.0).to(DTYPE)
    share = load_row_boxes(targets.ptr + 2 * targets.column, targets.row, targets.column, offs, mask, DTYPE)
    width, height = scalar(width, DTYPE), scalar(height, DTYPE)
    x, y, w, h = share.x1 * width, share.y1 * height, share.x2 * width, share.y2 * height
    image, label = image_value.to(tl.int64), label_value.to(tl.int64)
    is_whole = (image.to(DTYPE) == image_value) & (label.to(DTYPE) == label_value)
    angle = x
    if IS_ORIENTED:
        angle = tl.load(ptr + 6 * targets.column, mask=mask, other=0.0).to(DTYPE)
    corners = Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return Target(tl.where(is_whole, image, -1), label, corners, Oriented(x, y, w, h, angle))


@triton.jit
def _load_target_rows(targets, offs, mask, PACK: tl.constexpr, DTYPE: tl.constexpr):
    image = tl.load(targets.image_ptr + offs * targets.image_step, mask=mask, other=-1)
    label = tl.load(targets.label_ptr + offs * targets.label_step, mask=mask, other=-1)
    corners = load_row_boxes(targets.xyxy_ptr, targets.xyxy_row, targets.xyxy_column, offs, mask, DTYPE)
    xywh = Oriented(corners.x1, corners.y1, corners.x2, corners.y2, corners.x1)
    if PACK.IS_ORIENTED:
        xywh = load_oriented_rows(targets.xywh_ptr, targets.xywh_row, targets.xywh_column, offs, mask, DTYPE)
    elif PACK.HAS_XYWH:
        box = load_row_boxes(targets.xywh_ptr, targets.xywh_row, targets.xywh_column, offs, mask, DTYPE)
        xywh = Oriented(box.x1, box.y1, box.x2, box.y2, box.x1)
    return Target(image, label, corners, xywh)


@triton.jit
def store_rows(rows, target, offs, mask, HAS_XYWH: tl.constexpr, IS_ORIENTED: tl.constexpr):
    tl.store(rows.image_ptr + offs, target.image.to(rows.image_ptr.dtype.element_ty), mask=mask)
    tl.store(rows.label_ptr + offs, target.label, mask=mask)
    side = tl.arange(0, 4)[None, :]
    corners, xywh = target.xyxy, target.xywh
    if rows.xyxy_ptr is not None:
        corner_rows = box_rows(corners.x1, corners.y1, corners.x2, corners.y2)
        tl.store(rows.xyxy_ptr + (offs[:, None] * 4 + side), corner_rows, mask=mask[:, None])
    if HAS_XYWH:
        SIZE: tl.constexpr = 5 if IS_ORIENTED else 4
        tl.store(rows.xywh_ptr + (offs[:, None] * SIZE + side), box_rows(xywh.x, xywh.y, xywh.w, xywh.h), mask=mask[:, None])
        if IS_ORIENTED:
            tl.store(rows.xywh_ptr + (offs * SIZE + 4), xywh.angle, mask=mask)


@triton.jit
def _is_gt(target, B, PACK: tl.constexpr):
    """Which rows count as ground truth."""
    box = target.xyxy
    is_finite = (tl.abs(box.x1) < float("inf")) & (tl.abs(box.y1) < float("inf"))
    is_finite = is_finite & (tl.abs(box.x2) < float("inf")) & (tl.abs(box.y2) < float("inf"))
    width, height = box.x2 - box.x1, box.y2 - box.y1
    is_box = is_finite & (width > 0) & (width < float("inf")) & (height > 0) & (height < float("inf"))
    if PACK.IS_ORIENTED:
        is_long = (target.xywh.w >= PACK.MIN_SIDE) & (target.xywh.h >= PACK.MIN_SIDE)
        is_box = is_box & (tl.abs(target.xywh.angle) < float("inf")) & is_long
    return is_box & (target.image >= 0) & (target.image < B) & (target.label >= 0) & (target.label < PACK.C)


@triton.jit
def pack_rows(
    rows, targets, height, width, N, B, PACK: tl.constexpr, DTYPE: tl.constexpr, grid=None, RULE: tl.constexpr = None
):
    """All programs of a grid of two dimensions together write ``rows``, with image -1 for what does not count.

    With a ``RULE`` they write how many cells of the grid each walks over.
    """
    start = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * PACK.BLOCK
    while start < N:
        offs = start + tl.arange(0, PACK.BLOCK)
        mask = offs < N
        if PACK.IS_RAW:
            target = _load_raw_rows(targets, height, width, offs, mask, PACK.IS_ORIENTED, DTYPE)
        else:
            target = _load_target_rows(targets, offs, mask, PACK, DTYPE)
        image = tl.where(_is_gt(target, B, PACK), target.image, -1)
        target = Target(image, target.label, target.xyxy, target.xywh)
        store_rows(rows, target, offs, mask, PACK.HAS_XYWH, PACK.IS_ORIENTED)
        if RULE is not None:
            box = target.xywh if PACK.IS_ORIENTED else target.xyxy
            tl.store(rows.walk_ptr + offs, tl.where(image >= 0, walk_cells(box, grid, RULE), 0), mask=mask)
        start += tl.num_programs(0) * tl.num_programs(1) * PACK.BLOCK


@triton.jit
def unpack_rows(rows, targets, height, width, offs, mask, IS_ORIENTED: tl.constexpr, DTYPE: tl.constexpr):
    """Write raw rows ``offs`` [n] in pixels."""
    target = _load_raw_rows(targets, height, width, offs, mask, IS_ORIENTED, DTYPE)
    store_rows(rows, target, offs, mask, True, IS_ORIENTED)
