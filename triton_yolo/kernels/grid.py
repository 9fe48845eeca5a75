"""Tile functions over the cells of a feature pyramid. ``shapes`` is (h0, w0, h1, w1, ...), ``STRIDES`` one number a level."""

import triton
import triton.language as tl

from .launching import scalar


@triton.jit
def cell_centres(anchors, shapes, STRIDES: tl.constexpr, DTYPE: tl.constexpr):
    """Point (x, y) in cells and stride of every anchor."""
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
def anchor_points(
    anchors, mask, points_ptr, points_stride, shapes, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr
):
    """Point (x, y) in pixels of anchors: cells if ``IS_GRID``, else of ``points`` (A, 2)."""
    if IS_GRID:
        x, y, stride = cell_centres(anchors, shapes, STRIDES, DTYPE)
        x, y = x * stride, y * stride
    else:
        points_ptr += anchors.to(tl.int64) * points_stride[0]
        x = tl.load(points_ptr, mask=mask, other=0.0).to(DTYPE)
        y = tl.load(points_ptr + points_stride[1], mask=mask, other=0.0).to(DTYPE)
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
def rectangle_size(x1, y1, x2, y2, shapes, STRIDES: tl.constexpr, REACH: tl.constexpr = 0):
    """Number of cells of all levels in the rectangles [n] given in pixels, which reach ``REACH`` cells from their centre."""
    total = tl.zeros_like(x1).to(tl.int32)
    for level in tl.static_range(len(STRIDES)):
        _, columns = _reaching_span(x1, x2, shapes[2 * level + 1], STRIDES[level], REACH)
        _, rows = _reaching_span(y1, y2, shapes[2 * level], STRIDES[level], REACH)
        total += columns * rows
    return total


@triton.jit
def rectangle_cells(nth, x1, y1, x2, y2, shapes, STRIDES: tl.constexpr, DTYPE: tl.constexpr, REACH: tl.constexpr = 0):
    """The ``nth`` [g, n] cells of rectangles [g, 1], in order of their anchors: anchor, centre and stride in pixels.

    Past the last cell of a rectangle the result means nothing.
    """
    position = nth + tl.zeros_like(x1).to(tl.int32)
    columns, first_x, first_y = position * 0 + 1, position * 0, position * 0
    width, first_anchor, stride = position * 0, position * 0, position.to(DTYPE)
    before, start = tl.zeros_like(x1).to(tl.int32), 0
    for level in tl.static_range(len(STRIDES)):
        level_x, level_columns = _reaching_span(x1, x2, shapes[2 * level + 1], STRIDES[level], REACH)
        level_y, level_rows = _reaching_span(y1, y2, shapes[2 * level], STRIDES[level], REACH)
        is_here = (nth >= before) & (level_columns > 0)
        position = tl.where(is_here, nth - before, position)
        columns = tl.where(is_here, level_columns, columns)
        first_x, first_y = tl.where(is_here, level_x, first_x), tl.where(is_here, level_y, first_y)
        width = tl.where(is_here, shapes[2 * level + 1], width)
        first_anchor = tl.where(is_here, start, first_anchor)
        stride = tl.where(is_here, scalar(STRIDES[level], DTYPE), stride)
        before += level_columns * level_rows
        start += shapes[2 * level] * shapes[2 * level + 1]
    row = position // columns
    x, y = first_x + position - row * columns, first_y + row
    return first_anchor + y * width + x, (x.to(DTYPE) + 0.5) * stride, (y.to(DTYPE) + 0.5) * stride, stride
