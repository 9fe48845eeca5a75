"""Anchor points of the levels of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _levels


def make_anchors(
    feat_shapes: Sequence[Sequence[int]],
    strides: Sequence[float],
    *,
    offset: float = 0.5,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the anchor points of every level and their strides.

    Args:
        feat_shapes: (height, width) of every level, in cells.
        strides: stride of every level, in pixels.
        offset: where in its cell a point lies.
        device: where the result lives.
        dtype: type of the result.

    Returns:
        Points (A, 2) as (x, y) in cells of their level, row-major (y outer), levels one after another; strides (A,).
        Pixels are ``points * strides[:, None]``.

    Raises:
        ValueError: the two sequences differ in length, or a size or stride is not positive.

    Example:
        >>> points, strides = ty.make_anchors([(2, 2), (1, 1)], (8, 16))
        >>> (points * strides[:, None]).tolist()
        [[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [12.0, 12.0], [8.0, 8.0]]
    """
    strides = _checks.reals("strides", strides)
    sides = _levels.of(feat_shapes, strides).feat_shapes
    points, point_strides = [], []
    for height, width, stride in zip(sides[::2], sides[1::2], strides, strict=True):
        x = torch.arange(width, device=device, dtype=dtype) + offset
        y = torch.arange(height, device=device, dtype=dtype) + offset
        points.append(torch.cartesian_prod(y, x).flip(-1))
        point_strides.append(torch.full((height * width,), stride, device=device, dtype=dtype))
    return torch.cat(points), torch.cat(point_strides)
