"""Pairs of a ground-truth row and an anchor, found without looking at every anchor of every row."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .._rows import is_valid
from .._signatures import GroundTruth, Levels
from ..anchors import make_anchors


class Shape(NamedTuple):
    """Which points are inside boxes."""

    columns: Tensor
    """What the functions need of each box: (k, n)."""
    span: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    """Where on the x axis boxes (k, m) begin and end at heights (m,), and a hair more, if that depends on the height."""
    is_inside: Callable[[Tensor, Tensor], Tensor]
    """Whether points (2, m) are inside boxes (k, m). What lies between two points inside is inside too."""


_PART = 1 << 18  # pairs that are held at once: 15 MiB


def anchor_table(levels: Levels, like: Tensor) -> tuple[Tensor, Tensor]:
    """Anchor points in cells (2, A) and their strides (A,), in the type that ``like`` is computed in. Not to be written to."""
    return _anchor_table(levels, working_dtype(like.dtype), like.device)


@lru_cache(maxsize=32)
def _anchor_table(levels: Levels, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    shapes = list(zip(levels.feat_shapes[::2], levels.feat_shapes[1::2], strict=True))
    points, point_strides = make_anchors(shapes, levels.strides, device=device, dtype=dtype)
    return points.T.contiguous(), point_strides


def valid_rows(gt: GroundTruth, batch_size: int, num_classes: int, min_side: float = 0.0) -> Tensor:
    """Indices of the rows that count as ground truth."""
    return is_valid(*gt, batch_size, num_classes, min_side).nonzero().squeeze(1)


def by_images(rows: Tensor, image_index: Tensor, num_pairs: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Cut ``rows`` into parts with all rows of their images and about ``_PART`` pairs, if every row (N,) has so many."""
    images = image_index[rows]
    per_image = num_pairs.new_zeros(batch_size).index_add_(0, images, num_pairs[rows])
    part = torch.div(per_image.cumsum(0) - per_image, _PART, rounding_mode="floor")[images]
    for number in part.unique():
        yield rows[part == number]


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every segment its members: (segment, position in the segment) of ``counts.sum()`` members."""
    segment = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return segment, torch.arange(len(segment), device=counts.device) - starts.index_select(0, segment)


def grid_pairs(low: Tensor, high: Tensor, levels: Levels, shape: Shape | None = None) -> tuple[Tensor, Tensor]:
    """(rows, anchors) of the anchors of a pyramid in the rectangles ``low`` to ``high`` in pixels, in order.

    The rectangles are (n, 2), or (n, L, 2) if each level has its own. The anchors are those inside the ``shape`` that the
    rectangles are around; without one a superset, tight to a thousandth of a cell.
    """
    num_levels = len(levels.strides)
    sizes = torch.tensor(levels.feat_shapes, device=low.device).reshape(-1, 2).flip(-1)  # (L, 2) as (width, height)
    stride = torch.tensor(levels.strides, device=low.device, dtype=low.dtype)
    level_start = sizes.prod(-1).cumsum(0) - sizes.prod(-1)
    if low.dim() == 2:
        low, high = low[:, None], high[:, None]
    first, number = _cells_between(low, high, stride[:, None], sizes)  # (n, L, 2)
    # Rectangles to rows of cells, rows of cells to cells: two expansions are cheaper than a division for every cell.
    rectangle, y = expand(number[..., 1].flatten())
    nth = torch.div(rectangle, num_levels, rounding_mode="floor")
    level = rectangle - nth * num_levels
    first, number = first.flatten(0, 1)[rectangle], number[..., 0].flatten()[rectangle]
    x, y = first[:, 0], first[:, 1] + y
    if shape is not None:
        columns, step = shape.columns.index_select(1, nth), stride[level]
        if shape.span is not None:
            x, number = _cells_between(*shape.span(columns, (y + 0.5) * step), step, sizes[level, 0])
        _trim(x, number, y, step, columns, shape)
    # Cells of one strip after another count on, so that a cell is its place among all and what its strip adds to it.
    ahead = level_start[level] + y * sizes[level, 0] + x - (number.cumsum(0) - number)
    strip = torch.repeat_interleave(number)
    anchors = ahead.index_select(0, strip).add_(torch.arange(len(strip), device=strip.device))
    return nth.index_select(0, strip), anchors


def _trim(x: Tensor, number: Tensor, y: Tensor, step: Tensor, columns: Tensor, shape: Shape) -> None:
    """Shorten strips, ``number`` (m,) cells of size ``step`` from (x, y) on, to those with centres inside boxes (k, m)."""
    ends = (torch.stack([x, x + number - 1, y, y]).unflatten(0, (2, 2)) + 0.5) * step
    ragged = shape.is_inside(ends, columns[:, None]).all(0).logical_not().nonzero().squeeze(1)
    nth, place = expand(number[ragged])
    strip = ragged[nth]
    cells = torch.stack([x[strip] + place, y[strip]])
    kept = shape.is_inside((cells + 0.5) * step[strip], columns[:, strip])
    number[ragged] = nth[kept].bincount(minlength=len(ragged))
    x.scatter_reduce_(0, strip[kept], cells[0, kept], "amin", include_self=False)


def _cells_between(low: Tensor, high: Tensor, stride: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the cells below ``limit`` whose centres lie between, and their number."""
    zero = torch.zeros_like(limit, dtype=low.dtype)
    first = (low / stride - 0.501).ceil().clamp(zero, limit.to(low.dtype)).long()
    last = ((high / stride - 0.499).floor() + 1).clamp(zero, limit.to(low.dtype)).long()
    return first, (last - first).clamp(min=0)


def point_pairs(low: Tensor, high: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, anchors) of arbitrary ``points`` (A, 2) strictly inside the rectangles ``low`` to ``high`` (n, 2)."""
    x, by_x = points[:, 0].contiguous().sort()
    first = torch.searchsorted(x, low[:, 0].contiguous(), right=True)
    last = torch.searchsorted(x, high[:, 0].contiguous())
    rows, position = expand((last - first).clamp(min=0))
    anchors = by_x[first[rows] + position]
    y = points[anchors, 1]
    inside = (y > low[rows, 1]) & (y < high[rows, 1])
    return in_order(rows[inside], anchors[inside], len(points))


def in_order(rows: Tensor, anchors: Tensor, num_anchors: int) -> tuple[Tensor, Tensor]:
    """Pairs row after row, the anchors of each in order."""
    order = (rows * num_anchors + anchors).sort().values
    rows = torch.div(order, max(num_anchors, 1), rounding_mode="floor")
    return rows, order - rows * num_anchors
