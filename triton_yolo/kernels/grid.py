"""Tile functions over the cells of a feature pyramid: ``grid`` has its sizes, ``STRIDES`` one number a level."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Grid
from .boxes import scalar


class Cell(NamedTuple):
    """Cells [...]: anchor, centre and stride in pixels."""

    anchor: Any
    x: Any
    y: Any
    stride: Any


@triton.jit
def _no_tensors():
    return ()


@triton.jit
def sized(grid):
    """The grid with sizes that are tensors. One of 1 is a constant, which Triton 3.6 forgets in branches and loops."""
    shapes = _no_tensors()
    for i in tl.static_range(len(grid.shapes)):
        shapes = shapes + (tl.zeros((), tl.int32) + grid.shapes[i],)
    return Grid(shapes, tl.zeros((), tl.int32) + grid.A)


@triton.jit
def cell_centres(anchors, grid, STRIDES: tl.constexpr, DTYPE: tl.constexpr):
    """Point (x, y) in cells and stride of every anchor."""
    shapes = grid.shapes
    index, width = anchors, tl.zeros_like(anchors) + shapes[1]
    stride = tl.zeros_like(anchors).to(DTYPE) + scalar(STRIDES[0], DTYPE)
    start = 0
    for level in tl.static_range(1, len(STRIDES)):
        start += shapes[2 * level - 2] * shapes[2 * level - 1]
        is_past = anchors >= start
        index = tl.where(is_past, anchors - start, index)
        width = tl.where(is_past, shapes[2 * level + 1], width)
        stride = tl.where(is_past, scalar(STRIDES[level], DTYPE), stride)
    y = index // width
    return (index - y * width).to(DTYPE) + 0.5, y.to(DTYPE) + 0.5, stride


@triton.jit
def load_points(anchors, mask, points, DTYPE: tl.constexpr):
    """Arbitrary points (x, y) in pixels."""
    ptr = points.ptr + anchors.to(tl.int64) * points.point
    x = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    return x, tl.load(ptr + points.coordinate, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def anchor_points(anchors, mask, points, grid, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Point (x, y) in pixels of anchors: cells if ``IS_GRID``, else of ``points``."""
    if IS_GRID:
        x, y, stride = cell_centres(anchors, grid, STRIDES, DTYPE)
        x, y = x * stride, y * stride
    else:
        x, y = load_points(anchors, mask, points, DTYPE)
    return x, y


@triton.jit
def cell_span(low, high, size, STRIDE: tl.constexpr):
    """First cell and number of the cells whose centres lie between ``low`` and ``high`` in pixels.

    A superset, wider by a thousandth of a cell at each end: the caller's test is exact.
    """
    first = tl.minimum(tl.maximum(tl.ceil(low / STRIDE - 0.501), 0), size).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.floor(high / STRIDE - 0.499) + 1, 0), size).to(tl.int32)
    return first, tl.maximum(last - first, 0)


@triton.jit
def _reaching_span(low, high, size, STRIDE: tl.constexpr, REACH: tl.constexpr):
    """``cell_span``, at least ``REACH`` cells to either side of the middle."""
    if REACH > 0:
        middle = (low + high) / 2
        low, high = tl.minimum(low, middle - REACH * STRIDE), tl.maximum(high, middle + REACH * STRIDE)
    return cell_span(low, high, size, STRIDE)


@triton.jit
def rectangle_size(box, grid, STRIDES: tl.constexpr, REACH: tl.constexpr = 0):
    """Number of cells of all levels in the rectangles [n] given in pixels, which reach ``REACH`` cells from their centre."""
    shapes = grid.shapes
    total = tl.zeros_like(box.x1).to(tl.int32)
    for level in tl.static_range(len(STRIDES)):
        _, columns = _reaching_span(box.x1, box.x2, shapes[2 * level + 1], STRIDES[level], REACH)
        _, rows = _reaching_span(box.y1, box.y2, shapes[2 * level], STRIDES[level], REACH)
        total += columns * rows
    return total


@triton.jit
def most_cells(width, height, STRIDES: tl.constexpr, REACH: tl.constexpr = 0):
    """What no ``rectangle_size`` of such sides is larger than, as float, for a fraction of the instructions that it takes."""
    # The sum of (width / stride + margin) * (height / stride + margin) over the levels.
    MARGIN: tl.constexpr = 2 + 2 * REACH
    of_area, of_sides = 0.0, 0.0
    for level in tl.static_range(len(STRIDES)):
        of_area, of_sides = of_area + 1 / (STRIDES[level] * STRIDES[level]), of_sides + MARGIN / STRIDES[level]
    return width * height * of_area + (width + height) * of_sides + (MARGIN * MARGIN * len(STRIDES) + 1)


@triton.jit
def rectangle_cells(nth, box, grid, STRIDES: tl.constexpr, DTYPE: tl.constexpr, REACH: tl.constexpr = 0):
    """The ``nth`` [g, n] cells of rectangles [g, 1], in order of their anchors.

    Past the last cell of a rectangle the result means nothing.
    """
    shapes = grid.shapes
    position = nth + tl.zeros_like(box.x1).to(tl.int32)
    before, start = tl.zeros_like(box.x1).to(tl.int32), 0
    for level in tl.static_range(len(STRIDES)):
        level_x, level_columns = _reaching_span(box.x1, box.x2, shapes[2 * level + 1], STRIDES[level], REACH)
        level_y, level_rows = _reaching_span(box.y1, box.y2, shapes[2 * level], STRIDES[level], REACH)
        level_width, level_stride = shapes[2 * level + 1], scalar(STRIDES[level], DTYPE)
        if level == 0:  # there is nothing to choose yet
            columns, first_x, first_y = (
                position * 0 + tl.maximum(level_columns, 1),
                position * 0 + level_x,
                position * 0 + level_y,
            )
            width, first_anchor, stride = (
                position * 0 + level_width,
                position * 0,
                tl.zeros_like(position).to(DTYPE) + level_stride,
            )
        else:
            is_here = (nth >= before) & (level_columns > 0)
            position = tl.where(is_here, nth - before, position)
            columns = tl.where(is_here, level_columns, columns)
            first_x, first_y = tl.where(is_here, level_x, first_x), tl.where(is_here, level_y, first_y)
            width, first_anchor = tl.where(is_here, level_width, width), tl.where(is_here, start, first_anchor)
            stride = tl.where(is_here, level_stride, stride)
        before += level_columns * level_rows
        start += shapes[2 * level] * shapes[2 * level + 1]
    row = position // columns
    x, y = first_x + position - row * columns, first_y + row
    return Cell(first_anchor + y * width + x, (x.to(DTYPE) + 0.5) * stride, (y.to(DTYPE) + 0.5) * stride, stride)
