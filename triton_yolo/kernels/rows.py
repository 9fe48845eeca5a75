"""What assignments share: ground-truth rows, and one state an anchor that says whose it is.

``target_row`` (B, A) holds the state of an anchor between the launches: negative for background, the row that claimed it, or
``CONTESTED`` once two rows have. A row is an integer below ``CONTESTED``, so that maxima decide: no step depends on the order
in which programs run. ``best`` (B, A) means something at contested anchors only: the best key of all rows, with the row.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .boxes import box_columns
from .launching import INTERPRETED
from .topk import NONE, pack, unpack_index

CONTESTED: tl.constexpr = tl.constexpr(1 << 30)
_LOWEST: tl.constexpr = tl.constexpr(-(1 << 63))


def row_sizes(num_rows: int, num_anchors: int, block_p: int = 512) -> tuple[int, int, int]:
    """Rows and anchors a tile, and warps, of a kernel that walks the anchors of ground-truth rows.

    One row a program. 512 anchors hold all cells of three quarters of COCO's boxes at 640 px in one tile; four a thread leave
    room for the CIoU's values without spills.
    """
    if INTERPRETED:
        block_p = min(max(triton.next_power_of_2(num_anchors), 32), 2**14)
        return min(triton.next_power_of_2(num_rows), 2**18 // block_p), block_p, 1
    return 1, block_p, 4


def gt_rows(image_index: Tensor, labels: Tensor, *boxes: Tensor) -> tuple[Any, Any]:
    """Ground-truth rows and their strides as kernels take them; ``boxes`` are (N, 4), corners first."""
    strides = [stride for box in boxes for stride in box.stride()]
    return (image_index, labels, *boxes), (image_index.stride(0), labels.stride(0), *strides)


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


@triton.jit
def load_anchor_boxes(image, anchor, mask, ptr, stride, A, IS_DENSE: tl.constexpr, DTYPE: tl.constexpr):
    """Four coordinates [g, n] of the boxes (B, A, 4) of anchors [g, n] of images [g, 1]; ``IS_DENSE`` if contiguous."""
    if IS_DENSE:
        offs, step = (image * A + anchor) * 4, 1
    else:
        offs, step = image * stride[0] + anchor.to(tl.int64) * stride[1], stride[2]
    offs = tl.reshape(offs, (anchor.numel,))[:, None] + tl.arange(0, 4)[None, :] * step
    boxes = tl.load(ptr + offs, mask=tl.reshape(mask, (anchor.numel,))[:, None], other=0.0).to(DTYPE)
    x1, y1, x2, y2 = box_columns(boxes)
    x1, y1 = tl.reshape(x1, anchor.shape), tl.reshape(y1, anchor.shape)
    x2, y2 = tl.reshape(x2, anchor.shape), tl.reshape(y2, anchor.shape)
    return x1, y1, x2, y2


@triton.jit
def claim(target_row_ptr, best_ptr, first_cell, anchor, offs_g, is_claim):
    """Claim anchors [g, k] for rows ``offs_g`` [g]; their images start at ``first_cell`` [g, 1].

    The second claim of an anchor makes it contested and clears its place in ``best``, which nobody set before.
    """
    cell = tl.where(is_claim, first_cell + anchor, 0)
    # Not tl.broadcast_to: with one row, Triton 3.7's interpreter reads past the end of what an atomic operation broadcasts.
    row = offs_g.to(tl.int32)[:, None] + tl.zeros(cell.shape, tl.int32)
    earlier = tl.atomic_max(target_row_ptr + cell, row, mask=is_claim, sem="relaxed")
    is_contested = is_claim & (earlier >= 0)
    tl.atomic_max(target_row_ptr + cell, tl.full(cell.shape, CONTESTED, tl.int32), mask=is_contested, sem="relaxed")
    # A minimum, since Triton 3.7 has no exchange for gfx942.
    tl.atomic_min(best_ptr + cell, tl.full(cell.shape, _LOWEST, tl.int64), mask=is_contested, sem="relaxed")


@triton.jit
def contest(target_row_ptr, best_ptr, cell, value, offs_g, mask, IS_TIE_BREAK: tl.constexpr, IS_WIDE: tl.constexpr):
    """Raise ``best`` of contested cells [g, n] to the ``value`` that rows ``offs_g`` [g] have there, with the row.

    In float64 the row does not fit beside the value: a second launch, ``IS_TIE_BREAK``, lets the rows that have the best value
    raise ``target_row`` to their inverted number.
    """
    key, order = pack(value, offs_g.to(tl.int32)[:, None] + tl.zeros(cell.shape, tl.int32), IS_WIDE)
    if IS_TIE_BREAK:
        mask = mask & (tl.load(best_ptr + cell, mask=mask, other=NONE) == key)
        tl.atomic_max(target_row_ptr + cell, order, mask=mask, sem="relaxed")
    else:
        tl.atomic_max(best_ptr + cell, key, mask=mask, sem="relaxed")


@triton.jit
def owner(cell, mask, target_row_ptr, best_ptr, IS_WIDE: tl.constexpr):
    """Rows that cells belong to after the conflicts, negative for background and where ``mask`` is false."""
    state = tl.load(target_row_ptr + cell, mask=mask, other=-1)
    is_contested = state >= CONTESTED
    key = 0
    if not IS_WIDE:
        key = tl.load(best_ptr + cell, mask=is_contested, other=0)
    return tl.where(is_contested, unpack_index(key, state, IS_WIDE), state)
