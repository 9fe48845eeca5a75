"""What the dense passes do to stay within the processor's cache and off fresh memory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_BLOCK = 3 << 18  # elements
_PART = 1 << 14  # elements that are gathered: such copies are held, and leave gaps in the heap


def blocks(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (B, A, C) into pieces of about ``_BLOCK`` elements, each of which lies in one stretch, in either layout."""
    batch_size, *sizes = x.shape
    images = max(1, _BLOCK // max(1, sizes[0] * sizes[1]))
    axis = 0 if x.stride(1) > x.stride(2) else 1
    number = max(1, _BLOCK // max(1, sizes[1 - axis]))
    for b in range(0, batch_size, images):
        for start in range(0, sizes[axis], number):
            part, whole = slice(start, start + number), slice(None)
            yield slice(b, b + images), *((part, whole) if axis == 0 else (whole, part))


def row_parts(rows: Tensor, width: int) -> Iterator[slice]:
    """Cut ``rows`` (n,) with ``width`` numbers each into pieces of about ``_PART`` numbers."""
    number = max(1, _PART // max(1, width))
    for start in range(0, len(rows), number):
        yield slice(start, start + number)


def flattened(x: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, int, Tensor]:
    """Lay (B, A, C) out flat as it is, with the step between neighbours in A, and where ``x[first, 0, last]`` lie."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    by_first, step, by_last = x.stride()
    return x.as_strided((span,), (1,)), step, first * by_first + last * by_last


def untouched_zeros_like(x: Tensor) -> Tensor:
    """Zeros in the layout of ``x``; on the CPU the system zeroes a page when it is first written, and most never are."""
    if x.device.type != "cpu" or x.numel() == 0:
        return torch.zeros_like(x)
    flat = torch.from_numpy(np.zeros(x.numel() * x.element_size(), dtype=np.uint8)).view(x.dtype)
    return flat.as_strided(x.shape, torch.empty_like(x, device="meta").stride())
