"""What kernels take: tensors with their strides, and what belongs together, under one name each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .launch import new


class Tensor3(NamedTuple):
    """A tensor (B, A, C) of any layout."""

    ptr: Any
    image: int
    anchor: int
    channel: int


class Tensor2(NamedTuple):
    """A tensor of two dimensions, of any layout."""

    ptr: Any
    row: int
    column: int


class Head(NamedTuple):
    """What a head puts out, or its gradient: distances (B, A, 4R), angles (B, A, 1) of oriented boxes, logits (B, A, C).

    Each is a ``Tensor3`` or None. Kernels ask that of a part: Triton 3.6 cannot tell whether a tuple with a None in it is None.
    """

    dist: Any
    angle: Any
    scores: Any


NO_HEAD = Head(None, None, None)


class Grid(NamedTuple):
    """Sizes (h0, w0, h1, w1, ...) of the levels, and the number of anchors."""

    shapes: tuple[int, ...]
    A: int


class Points(NamedTuple):
    """Arbitrary anchor points (A, 2) in pixels, and their strides (A,), None where nobody asks."""

    ptr: Any
    point: int
    coordinate: int
    strides_ptr: Any
    step: int


class RawRows(NamedTuple):
    """Rows (N, 6) of (image index, class, cx, cy, w, h), in shares of the image; (N, 7) have an angle."""

    ptr: Any
    row: int
    column: int


class TargetRows(NamedTuple):
    """Rows (N,) of image index and label, int64, and boxes (N, 4) in pixels as corners and as centre and size.

    Oriented boxes have an angle behind centre and size, (N, 5).
    """

    image_ptr: Any
    image_step: int
    label_ptr: Any
    label_step: int
    xyxy_ptr: Any
    xyxy_row: int
    xyxy_column: int
    xywh_ptr: Any
    xywh_row: int
    xywh_column: int


class Rows(NamedTuple):
    """Ground truth as ``pack_rows`` leaves it: image (N,) int32, -1 if a row does not count; label (N,) int64; boxes (N, 4).

    Of oriented boxes it leaves no corners, but centre, size and angle (N, 5). ``walk`` (N,) int32, None where nobody asks, says
    how many cells a row looks through for its candidates, 0 if it does not count.
    """

    image_ptr: Any
    label_ptr: Any
    xyxy_ptr: Any
    xywh_ptr: Any
    walk_ptr: Any


class Anchors(NamedTuple):
    """A list of anchors an image, appended to in any order: anchors (B, A), of which the first ``count`` (B,) are in it."""

    ptr: Any
    count_ptr: Any


class State(NamedTuple):
    """Whose each anchor is between the launches, see ``rows``: row (B, A) int32, best key (B, A) int64, what is contested."""

    row_ptr: Any
    best_ptr: Any
    contested: Anchors


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Everything is computed in float32, or in float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


Address = Callable[[Tensor], Any]  # what kernels take for a tensor


def tensor3(address: Address, x: Tensor) -> Tensor3:
    return new(Tensor3, (address(x), *x.stride()))


def points_of(address: Address, points: Tensor | None, strides: Tensor | None) -> Points:
    """Points (A, 2) and strides (A,), of which either may be missing."""
    place = (None, 0, 0) if points is None else (address(points), *points.stride())
    return Points(*place, *((None, 0) if strides is None else (address(strides), strides.stride(0))))


def targets_of(address: Address, targets: list[Tensor]) -> RawRows | TargetRows:
    """Ground truth as operations take it."""
    if len(targets) == 1:
        return new(RawRows, (address(targets[0]), *targets[0].stride()))
    image, label, xyxy, xywh = targets
    corners, centres = (address(xyxy), *xyxy.stride()), (address(xywh), *xywh.stride())
    return TargetRows._make((address(image), image.stride(0), address(label), label.stride(0), *corners, *centres))
