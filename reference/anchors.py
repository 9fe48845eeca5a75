"""Anchor points: the centres of the cells of every level."""

from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    feat_shapes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    *,
    offset: float = 0.5,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return anchor points in cells (A, 2) as (x, y), row-major, level after level, and their strides (A,)."""
    points, point_strides = [], []
    for (height, width), stride in zip(feat_shapes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append(torch.stack([x, y], -1).reshape(-1, 2))
        point_strides.append(torch.full((height * width,), float(stride), dtype=torch.float64))
    return (
        torch.cat(points).to(device=device, dtype=dtype) + offset,
        torch.cat(point_strides).to(device=device, dtype=dtype),
    )
