"""What assignments share: ground-truth rows, and one state an anchor that says whose it is.

``target_row`` (B, A) holds the state of an anchor between the launches: negative for background, the row that claimed it, or
``CONTESTED`` once two rows have. A row is an integer below ``CONTESTED``, so that maxima decide: no step depends on the order
in which programs run. ``best`` (B, A) means something at contested anchors only: the best key of all rows, with the row.

Programs append to lists of anchors in whatever order they run, and nothing may depend on it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
