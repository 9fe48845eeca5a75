"""What assignments share: ground-truth rows, and one state an anchor that says whose it is.

``target_row`` (B, A) holds the state of an anchor between the launches: negative for background, the row that claimed it, or
``CONTESTED`` once two rows have. A row is an integer below ``CONTESTED``, so that maxima decide: no step depends on the order
in which programs run. ``best`` (B, A) means something at contested anchors only: the best key of all rows, with the row.

A list of anchors, of those contested for example, is a pair: anchors (B, A), of which a count (B,) are in the list of an image.
Programs append in whatever order they run, and nothing may depend on it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import INTERPRETED
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


def claim_sizes(num_rows: int, num_anchors: int, block_p: int, num_warps: int) -> dict[str, int]:
    """The same for a kernel that keeps a list of the best: ``PARTS`` lists a row, a warp each, that are merged at the end."""
    block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, block_p, num_warps)
    return {"BLOCK_G": block_g, "PARTS": 1 if INTERPRETED else num_warps, "BLOCK_P": block_p, "num_warps": num_warps}


def new_list(like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory of a list of anchors, for states (B, A); the counts are yet to be cleared."""
    return torch.empty_like(like), like.new_empty(like.shape[0])


def gt_rows(image_index: Tensor, labels: Tensor, *boxes: Tensor) -> tuple[Any, Any]:
    """Ground-truth rows and their strides as kernels take them; ``boxes`` are (N, 4), corners first."""
    strides = [stride for box in boxes for stride in box.stride()]
    return (image_index, labels, *boxes), (image_index.stride(0), labels.stride(0), *strides)


@triton.jit
def places(start, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Numbers [parts, n] from ``start`` on, those of a part in one warp."""
    return start + tl.arange(0, PARTS)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]


@triton.jit
def load_rows(gt, gt_stride, offs_g, N, B, C: tl.constexpr, DTYPE: tl.constexpr):
    """Rows [g, 1]: image, label, whether it counts as ground truth; its box."""
    offs_g = offs_g[:, None]
    mask = offs_g < N
    image = tl.load(gt[0] + offs_g * gt_stride[0], mask=mask, other=-1)
    label = tl.load(gt[1] + offs_g * gt_stride[1], mask=mask, other=-1)
    ptr = gt[2] + offs_g.to(tl.int64) * gt_stride[2]
    x1 = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    y1 = tl.load(ptr + gt_stride[3], mask=mask, other=0.0).to(DTYPE)
    x2 = tl.load(ptr + 2 * gt_stride[3], mask=mask, other=0.0).to(DTYPE)
    y2 = tl.load(ptr + 3 * gt_stride[3], mask=mask, other=0.0).to(DTYPE)

    is_finite = (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    is_finite = is_finite & (tl.abs(x2) < float("inf")) & (tl.abs(y2) < float("inf"))
    width, height = x2 - x1, y2 - y1
    is_box = is_finite & (width > 0) & (width < float("inf")) & (height > 0) & (height < float("inf"))
    is_gt = is_box & (image >= 0) & (image < B) & (label >= 0) & (label < C)
    return (image.to(tl.int64), label.to(tl.int64), is_gt), (x1, y1, x2, y2)


def empty_boxes(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Boxes (B, A, 4) of predictions (B, A, ...), one coordinate after another: a warp reads neighbours of each at once."""
    return like.new_empty((like.shape[0], 4, like.shape[1]), dtype=dtype).transpose(1, 2)


@triton.jit
def load_anchor_boxes(image, anchor, mask, ptr, stride, DTYPE: tl.constexpr):
    """Four coordinates [g, n] of the boxes (B, A, 4) of anchors [g, n] of images [g, 1]."""
    ptr += image * stride[0] + anchor.to(tl.int64) * stride[1]
    x1 = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    y1 = tl.load(ptr + stride[2], mask=mask, other=0.0).to(DTYPE)
    x2 = tl.load(ptr + 2 * stride[2], mask=mask, other=0.0).to(DTYPE)
    y2 = tl.load(ptr + 3 * stride[2], mask=mask, other=0.0).to(DTYPE)
    return x1, y1, x2, y2


@triton.jit
def store_anchor_boxes(image, anchor, mask, ptr, stride, x1, y1, x2, y2):
    """The same for anchors [n] of one image."""
    ptr += image * stride[0] + anchor.to(tl.int64) * stride[1]
    tl.store(ptr, x1, mask=mask)
    tl.store(ptr + stride[2], y1, mask=mask)
    tl.store(ptr + 2 * stride[2], x2, mask=mask)
    tl.store(ptr + 3 * stride[2], y2, mask=mask)


@triton.jit
def list_length(anchors, image, is_gt):
    """Length [g, 1] of the lists of images [g, 1], 0 where ``is_gt`` is false."""
    return tl.load(anchors[1] + image, mask=is_gt, other=0)


@triton.jit
def load_listed(anchors, image, nth, mask, A):
    """The ``nth`` anchors [g, n] in the lists of images [g, 1]."""
    return tl.load(anchors[0] + image * A + nth, mask=mask, other=0)


@triton.jit
def append(anchors, image, anchor, mask, A):
    """Add anchors [g, n] to the lists of images [g, 1]."""
    image = tl.where(mask, image, 0)
    nth = tl.atomic_add(anchors[1] + image, tl.full(anchor.shape, 1, tl.int32), mask=mask, sem="relaxed")
    tl.store(anchors[0] + image * A + nth, anchor, mask=mask)


@triton.jit
def claim(target_row_ptr, best_ptr, contested, image, anchor, offs_g, is_claim, A):
    """Claim anchors [g, k] of images [g, 1] for rows ``offs_g`` [g].

    The second claim of an anchor makes it contested: it is listed, and its place in ``best``, which nobody set before, cleared.
    """
    cell = tl.where(is_claim, image * A + anchor, 0)
    # Not tl.broadcast_to: with one row, Triton 3.7's interpreter reads past the end of what an atomic operation broadcasts.
    row = offs_g.to(tl.int32)[:, None] + tl.zeros(cell.shape, tl.int32)
    is_late = is_claim & (tl.atomic_max(target_row_ptr + cell, row, mask=is_claim, sem="relaxed") >= 0)
    earlier = tl.atomic_max(target_row_ptr + cell, tl.full(cell.shape, CONTESTED, tl.int32), mask=is_late, sem="relaxed")
    is_second = is_late & (earlier < CONTESTED)  # of one claim only, whatever came in between
    tl.store(best_ptr + cell, tl.full(cell.shape, LOWEST, tl.int64), mask=is_second)
    append(contested, image, anchor, is_second, A)


@triton.jit
def contest(target_row_ptr, best_ptr, cell, value, offs_g, mask, IS_TIE_BREAK: tl.constexpr, IS_WIDE: tl.constexpr):
    """Raise ``best`` of contested cells [g, n] to the ``value`` that rows ``offs_g`` [g] have there, with the row.

    In float64 the row does not fit beside the value: a second launch, ``IS_TIE_BREAK``, lets the rows that have the best value
    raise ``target_row`` to their inverted number.
    """
    key, order = pack(value, offs_g.to(tl.int32)[:, None] + tl.zeros(cell.shape, tl.int32), IS_WIDE)
    if IS_TIE_BREAK:
        mask = mask & (tl.load(best_ptr + cell, mask=mask, other=LOWEST) == key)
        tl.atomic_max(target_row_ptr + cell, order, mask=mask, sem="relaxed")
    else:
        tl.atomic_max(best_ptr + cell, key, mask=mask, sem="relaxed")


@triton.jit
def winner(cell, state, is_contested, best_ptr, IS_WIDE: tl.constexpr):
    """Rows that have the best of contested cells with these states."""
    key = 0
    if not IS_WIDE:
        key = tl.load(best_ptr + cell, mask=is_contested, other=0)
    return unpack_index(key, state, IS_WIDE)
