"""Ground-truth rows, unpacked in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import box_rows
from .launching import FIXED, INTERPRETED, compute_type, on_device, scalar


@triton.jit
def _unpack_kernel(
    image_ptr, label_ptr, xyxy_ptr, xywh_ptr, rows_ptr, rows_stride, width: tl.float64, height: tl.float64, N,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK rows of (image index, class, cx, cy, w, h) in shares of the image, and writes boxes in pixels."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    width, height = scalar(width, DTYPE), scalar(height, DTYPE)
    ptr, step = rows_ptr + offs.to(tl.int64) * rows_stride[0], rows_stride[1]
    tl.store(image_ptr + offs, tl.load(ptr, mask=mask, other=0.0).to(DTYPE).to(tl.int64), mask=mask)
    tl.store(label_ptr + offs, tl.load(ptr + step, mask=mask, other=0.0).to(DTYPE).to(tl.int64), mask=mask)
    x = tl.load(ptr + 2 * step, mask=mask, other=0.0).to(DTYPE) * width
    y = tl.load(ptr + 3 * step, mask=mask, other=0.0).to(DTYPE) * height
    w = tl.load(ptr + 4 * step, mask=mask, other=0.0).to(DTYPE) * width
    h = tl.load(ptr + 5 * step, mask=mask, other=0.0).to(DTYPE) * height
    offs = offs[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(xywh_ptr + offs, box_rows(x, y, w, h), mask=mask[:, None])
    tl.store(xyxy_ptr + offs, box_rows(x - w / 2, y - h / 2, x + w / 2, y + h / 2), mask=mask[:, None])


@on_device
def unpack_rows(rows: Tensor, width: float, height: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = len(rows)
    image_index = rows.new_empty(num_rows, dtype=torch.int64)
    xyxy = rows.new_empty((num_rows, 4), dtype=working_dtype(rows.dtype))
    labels, xywh = torch.empty_like(image_index), torch.empty_like(xyxy)
    if num_rows:
        block = min(triton.next_power_of_2(num_rows), 2**14) if INTERPRETED else 128
        _unpack_kernel[(triton.cdiv(num_rows, block),)](
            image_index, labels, xyxy, xywh, rows, rows.stride(), width, height, num_rows,
            DTYPE=compute_type(rows.dtype), BLOCK=block, num_warps=4, **FIXED,
        )  # fmt: skip
    return image_index, labels, xyxy, xywh
