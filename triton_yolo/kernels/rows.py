"""What assignments share: ground-truth rows, and one state an anchor that says whose it is.

``target_row`` (B, A) holds the state of an anchor between the launches: negative for background, the row that claimed it, or
``CONTESTED`` once two rows have. A row is an integer below ``CONTESTED``, so that maxima decide: no step depends on the order
in which programs run. ``best`` (B, A) means something at contested anchors only: the best key of all rows, with the row.

Programs append to lists of anchors in whatever order they run, and nothing may depend on it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import box_rows, scalar
from .launch import INTERPRETED
from .oriented import Oriented
from .topk import LOWEST, pack, unpack_index

CONTESTED: tl.constexpr = tl.constexpr(1 << 30)


def row_sizes(num_rows: int, num_anchors: int, block_p: int, num_warps: int) -> tuple[int, int, int]:
    """Rows and anchors a tile, and warps, of a kernel that walks the anchors of ground-truth rows.

    One row a program. Most rows have few anchors, so that wide tiles would be empty, and a few have thousands, for which the
    others wait: the figures behind each choice are in NOTES.md.
    """
    if INTERPRETED:
        block_p = min(max(triton.next_power_of_2(num_anchors), 32), 2**14)
        return min(triton.next_power_of_2(num_rows), 2**18 // block_p), block_p, 1
    return 1, block_p, num_warps


class Box(NamedTuple):
    """Corners [...]."""

    x1: Any
    y1: Any
    x2: Any
    y2: Any


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


class Truth(NamedTuple):
    """Ground-truth rows [g, 1]: number, image, label, whether they count, box in pixels, ``Box`` or ``Oriented``."""

    row: Any
    image: Any
    label: Any
    is_gt: Any
    box: Any


@triton.jit
def load_row_boxes(ptr, stride, step, row, mask, DTYPE: tl.constexpr):
    """Four numbers [...] of each row [...], which lie ``step`` apart."""
    ptr += row.to(tl.int64) * stride
    x1 = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    y1 = tl.load(ptr + step, mask=mask, other=0.0).to(DTYPE)
    x2 = tl.load(ptr + 2 * step, mask=mask, other=0.0).to(DTYPE)
    y2 = tl.load(ptr + 3 * step, mask=mask, other=0.0).to(DTYPE)
    return Box(x1, y1, x2, y2)


@triton.jit
def load_oriented_rows(ptr, stride, step, row, mask, DTYPE: tl.constexpr):
    """Centre, size and angle [...] of each row [...], which lie ``step`` apart."""
    box = load_row_boxes(ptr, stride, step, row, mask, DTYPE)
    angle = tl.load(ptr + row.to(tl.int64) * stride + 4 * step, mask=mask, other=0.0).to(DTYPE)
    return Oriented(box.x1, box.y1, box.x2, box.y2, angle)


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
def pack_rows(rows, targets, height, width, N, B, PACK: tl.constexpr, DTYPE: tl.constexpr):
    """All programs of a grid of two dimensions together write ``rows``, with image -1 for what does not count."""
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
        start += tl.num_programs(0) * tl.num_programs(1) * PACK.BLOCK


@triton.jit
def unpack_rows(rows, targets, height, width, offs, mask, IS_ORIENTED: tl.constexpr, DTYPE: tl.constexpr):
    """Write raw rows ``offs`` [n] in pixels."""
    target = _load_raw_rows(targets, height, width, offs, mask, IS_ORIENTED, DTYPE)
    store_rows(rows, target, offs, mask, True, IS_ORIENTED)


@triton.jit
def load_rows(rows, offs_g, N, DTYPE: tl.constexpr, IS_ORIENTED: tl.constexpr = False):
    """Ground truth of rows ``offs_g`` [g]."""
    row = offs_g.to(tl.int32)[:, None]
    mask = row < N
    image = tl.load(rows.image_ptr + row, mask=mask, other=-1)
    label = tl.load(rows.label_ptr + row, mask=mask, other=-1)
    if IS_ORIENTED:
        box = load_oriented_rows(rows.xywh_ptr, 5, 1, row, mask, DTYPE)
    else:
        box = load_row_boxes(rows.xyxy_ptr, 4, 1, row, mask, DTYPE)
    return Truth(row, image.to(tl.int64), label, image >= 0, box)


@triton.jit
def load_anchor_boxes(boxes, image, anchor, mask, DTYPE: tl.constexpr):
    """Boxes [g, n] of anchors [g, n] of images [g, 1], from ``boxes`` (B, A, 4)."""
    ptr = boxes.ptr + image * boxes.image + anchor.to(tl.int64) * boxes.anchor
    x1 = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    y1 = tl.load(ptr + boxes.channel, mask=mask, other=0.0).to(DTYPE)
    x2 = tl.load(ptr + 2 * boxes.channel, mask=mask, other=0.0).to(DTYPE)
    y2 = tl.load(ptr + 3 * boxes.channel, mask=mask, other=0.0).to(DTYPE)
    return Box(x1, y1, x2, y2)


@triton.jit
def store_anchor_boxes(boxes, image, anchor, mask, box):
    """The same for anchors [n] of one image."""
    ptr = boxes.ptr + image * boxes.image + anchor.to(tl.int64) * boxes.anchor
    tl.store(ptr, box.x1, mask=mask)
    tl.store(ptr + boxes.channel, box.y1, mask=mask)
    tl.store(ptr + 2 * boxes.channel, box.x2, mask=mask)
    tl.store(ptr + 3 * boxes.channel, box.y2, mask=mask)


@triton.jit
def list_length(anchors, truth):
    """Length [g, 1] of the lists of the rows' images, 0 for a row that does not count."""
    return tl.load(anchors.count_ptr + truth.image, mask=truth.is_gt, other=0)


@triton.jit
def load_listed(anchors, image, nth, mask, A):
    """The ``nth`` anchors [g, n] in the lists of images [g, 1]."""
    return tl.load(anchors.ptr + image * A + nth, mask=mask, other=0)


@triton.jit
def append(anchors, image, anchor, mask, A):
    """Add anchors [g, n] to the lists of images [g, 1]."""
    image = tl.where(mask, image, 0)
    nth = tl.atomic_add(anchors.count_ptr + image, tl.full(anchor.shape, 1, tl.int32), mask=mask, sem="relaxed")
    tl.store(anchors.ptr + image * A + nth, anchor, mask=mask)


@triton.jit
def contest(state, truth, cell, value, mask, IS_TIE_BREAK: tl.constexpr, IS_WIDE: tl.constexpr):
    """Raise ``best`` of contested cells [g, n] to the ``value`` that rows [g, 1] have there, with the row.

    In float64 the row does not fit beside the value: a second launch, ``IS_TIE_BREAK``, lets the rows that have the best value
    raise ``target_row`` to their inverted number.
    """
    key, order = pack(value, truth.row + tl.zeros(cell.shape, tl.int32), IS_WIDE)
    if IS_TIE_BREAK:
        mask = mask & (tl.load(state.best_ptr + cell, mask=mask, other=LOWEST) == key)
        tl.atomic_max(state.row_ptr + cell, order, mask=mask, sem="relaxed")
    else:
        tl.atomic_max(state.best_ptr + cell, key, mask=mask, sem="relaxed")


@triton.jit
def winner(state, cell, owner, is_contested, IS_WIDE: tl.constexpr):
    """Rows that have the best of contested cells, whose ``row_ptr`` holds ``owner``."""
    key = 0
    if not IS_WIDE:
        key = tl.load(state.best_ptr + cell, mask=is_contested, other=0)
    return unpack_index(key, owner, IS_WIDE)
