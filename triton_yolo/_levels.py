"""Levels of a feature pyramid, from the sizes that a caller gives."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _checks
from ._signatures import Levels

_known: dict[Any, Levels] = {}
_MAX_KNOWN = 256


def of_head(
    preds: Mapping[str, Tensor], channels: tuple[int, ...], feat_shapes: Sequence[Sequence[int]], strides: tuple[float, ...]
) -> Levels:
    """Check predictions (B, A, ``channels``) and levels; those like others that passed are not looked at twice."""
    key: Any = None
    if isinstance(feat_shapes, list | tuple) and not torch.compiler.is_compiling():
        try:
            feat_shapes = [(height, width) for height, width in feat_shapes]  # an iterator gives its sides once
            key = channels, strides, *feat_shapes
            for x in preds.values():
                key += x.shape, x.dtype, x.device
            for height, width in feat_shapes:
                if type(height) is not int or type(width) is not int:  # 4.0 is equal to 4, and symbols stay unknown
                    key = None
            if (known := _known.get(key)) is not None:
                return known
        except (AttributeError, RuntimeError, TypeError, ValueError):
            key = None  # the checks say what is wrong, if anything is
    first = None
    for (name, x), size in zip(preds.items(), channels, strict=True):
        _checks.tensor(name, x, ("B", "A", size) if first is None else (*first.shape[:2], size), like=first)
        first = x if first is None else first
    assert first is not None
    result = of(feat_shapes, strides, first.shape[1])
    if key is not None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = result
    return result


def of(feat_shapes: Sequence[Sequence[int]], strides: tuple[float, ...], num_anchors: int | None = None) -> Levels:
    """Check the sizes of the levels against the strides and the number of anchors."""
    if not isinstance(feat_shapes, list | tuple | Iterable):  # the first are quick to tell
        raise TypeError(f"feat_shapes must be a sequence of (h, w), got {feat_shapes!r}")
    shapes = list(feat_shapes)
    if len(shapes) != len(strides) or not shapes:
        _bad_levels(f"have one (h, w) for each of the {len(strides)} strides", shapes)
    flat: list[int] = []
    total = 0
    for shape in shapes:
        try:
            height, width = shape
        except (TypeError, ValueError):
            _bad_levels("hold positive (h, w)", shapes)
        if not (isinstance(height, _checks.SIZES) and isinstance(width, _checks.SIZES)):
            height, width = _whole_sides(height, width, shapes)
        if height < 1 or width < 1:
            _bad_levels("hold positive (h, w)", shapes)
        flat += (height, width)
        total = total + height * width
    image_height, image_width = flat[0] * strides[0], flat[1] * strides[0]
    for level in range(1, len(strides)):
        stride = strides[level]
        bound = stride if stride > strides[0] else strides[0]
        if abs(flat[2 * level] * stride - image_height) > bound or abs(flat[2 * level + 1] * stride - image_width) > bound:
            _bad_levels(f"be sizes of one image at strides {strides}, in their order, each (h, w)", shapes)
    if num_anchors is not None and total != num_anchors:
        _bad_levels(f"have as many cells as the predictions have anchors ({num_anchors}), not {total}", shapes)
    return Levels(tuple(flat), strides)


def _whole_sides(height: Any, width: Any, shapes: Sequence[Any]) -> tuple[int, int]:
    """Sides of NumPy's or of a tensor."""
    try:
        return index(height), index(width)
    except TypeError:
        _bad_levels("hold whole (h, w)", shapes)


def _bad_levels(must: str, shapes: Sequence[Any]) -> NoReturn:
    got = [tuple(shape) if isinstance(shape, Iterable) else shape for shape in shapes]
    raise ValueError(f"feat_shapes must {must}, got {got}")
