"""What the dense passes do to stay within the processor's cache and off fresh memory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements
_PART = 1 << 14  # elements that are gathered: such copies are held, and leave gaps in the heap


def blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, A, C) into pieces of about ``_BLOCK`` elements."""
    batch_size, num_anchors, num_classes = x.shape
    images = max(1, _BLOCK // max(1, num_anchors * num_classes))
    anchors = max(1, min(num_anchors, _BLOCK // max(1, num_classes)))
    for b in range(0, batch_size, images):
        for a in range(0, num_anchors, anchors):
            yield slice(b, b + images), slice(a, a + anchors)


def row_parts(rows: Tensor, width: int) -> Iterator[slice]:
    """Cut ``rows`` (n,) with ``width`` numbers each into pieces of about ``_PART`` numbers."""
    number = max(1, _PART // max(1, width))
    for start in range(0, len(rows), number):
        yield slice(start, start + number)


def gathered(x: Tensor, *index: Tensor) -> Tensor:
    """The same as ``x[index]``, of one index a dimension, in a third of the time."""
    if x.numel() == 0:
        return x[index]
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    offsets = sum(i * stride for i, stride in zip(index, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).index_select(0, offsets)  # type: ignore[arg-type]


def untouched_zeros_like(x: Tensor) -> Tensor:
    """Zeros in the layout of ``x``; on the CPU the system zeroes a page when it is first written, and most never are."""
    if x.device.type != "cpu" or x.numel() == 0:
        return torch.zeros_like(x)
    flat = torch.from_numpy(np.zeros(x.numel() * x.element_size(), dtype=np.uint8)).view(x.dtype)
    return flat.as_strided(x.shape, torch.empty_like(x, device="meta").stride())
