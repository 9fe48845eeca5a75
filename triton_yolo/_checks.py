"""Checks of arguments: clear errors, never a synchronisation.

What runs at every step looks at attributes and builds no text unless something is wrong: the text of a size would make a
constant of it in a compiled graph.
"""

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ._signatures import Levels

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIZES = (int, torch.SymInt)
_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
_WHOLE_UP_TO = {torch.float16: 2048, torch.bfloat16: 256}  # beyond, these types skip whole numbers


def require(condition: bool, argument: str, must: str, got: object) -> None:
    """Raise a ValueError that names the argument, what it must be and what it was."""
    if not condition:
        raise ValueError(f"{argument} must {must}, got {got}")


def warn(message: str) -> None:
    """Warn at the line of the caller of this package, however many frames of PyTorch's are in between."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("triton_yolo", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


# ---- settings


def one_of(argument: str, value: T, allowed: Sequence[T]) -> T:
    require(value in allowed, argument, f"be one of {', '.join(map(repr, allowed))}", repr(value))
    return value


def whole(argument: str, value: Any, least: int = 1) -> int:
    """A whole number, at least ``least``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a whole number, got {value!r}")
    require(value >= least, argument, f"be at least {least}", value)
    return int(value)


def real(argument: str, value: Any, *, is_positive: bool = False) -> float:
    """A finite number that is not negative, or positive."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    is_good = (value > 0 if is_positive else value >= 0) and value < math.inf  # a graph may hold the number as a symbol
    require(is_good, argument, f"be finite and {'positive' if is_positive else 'not negative'}", value)
    return float(value)


def reals(argument: str, values: Iterable[Any]) -> tuple[float, ...]:
    """Positive numbers, one a level."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{argument} must be a sequence, got {values!r}")
    result = tuple(real(argument, value, is_positive=True) for value in values)
    require(len(result) > 0, argument, "have one number a level", result)
    return result


def image_size(argument: str, value: Any) -> tuple[float, float]:
    """Height and width from one number or two, of any kind that the host knows."""
    value = _on_host(argument, value)
    if not isinstance(value, Sequence):
        value = value, value
    require(not isinstance(value, str) and len(value) == 2, argument, "be (height, width) or one number", value)
    height, width = _on_host(argument, value[0]), _on_host(argument, value[1])
    for side in (height, width):
        if not isinstance(side, _NUMBERS) or isinstance(side, bool):
            raise TypeError(f"{argument} must be (height, width) or one number, got {side!r}")
        if not 0 < side < math.inf:
            raise ValueError(f"{argument} must be finite and positive, got {side}")
    return height, width


def _on_host(argument: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(f"{argument} must be numbers, since reading a tensor on {value.device} synchronises")
    return value.tolist() if not isinstance(value, _NUMBERS) and hasattr(value, "tolist") else value


# ---- tensors


def tensor(argument: str, x: Tensor, shape: Sequence[int | str], *, like: Tensor | None = None, is_float: bool = True) -> None:
    """Check rank, sizes (a string stands for any size), type and, against ``like``, the device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(x).__name__}")
    sizes = x.shape
    fits = len(sizes) == len(shape)
    if fits:
        for have, want in zip(sizes, shape, strict=True):
            if type(want) is not str and have != want:
                fits = False
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{argument} must have shape ({expected}), got {tuple(sizes)}")
    if is_float and x.dtype not in FLOATS:
        raise TypeError(f"{argument} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{argument} must be on {like.device}, got {x.device}")


def per_slot(argument: str, x: Tensor, like: Tensor) -> Tensor:
    """Check one value a ground-truth slot, (B, G) or (B, G, 1) as ``like`` (B, G, ...) has them, and return (B, G)."""
    shape = like.shape[:2]
    is_column = isinstance(x, Tensor) and x.dim() == 3
    tensor(argument, x, (*shape, 1) if is_column else shape, like=like, is_float=False)
    return x.reshape(shape)


def levels(feat_shapes: Sequence[Sequence[int]], strides: tuple[float, ...], num_anchors: int | None = None) -> Levels:
    """Check the sizes of the levels against the strides and the number of anchors."""
    if not isinstance(feat_shapes, Iterable):
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
        if not (isinstance(height, _SIZES) and isinstance(width, _SIZES)):
            height, width = _whole_sides(height, width, shapes)
        if height < 1 or width < 1:
            _bad_levels("hold positive (h, w)", shapes)
        flat += (height, width)
        total = total + height * width
    height, width = flat[0] * strides[0], flat[1] * strides[0]
    for level in range(1, len(strides)):
        stride = strides[level]
        bound = stride if stride > strides[0] else strides[0]
        if abs(flat[2 * level] * stride - height) > bound or abs(flat[2 * level + 1] * stride - width) > bound:
            _bad_levels(f"be sizes of one image at strides {strides}, in their order, each (h, w)", shapes)
    if num_anchors is not None and total != num_anchors:
        _bad_levels(f"have as many cells as the predictions have anchors ({num_anchors}), not {total}", shapes)
    return Levels(tuple(flat), strides)


def _whole_sides(height: Any, width: Any, shapes: Sequence[Any]) -> tuple[int, int]:
    """Sides of NumPy's or of a tensor."""
    try:
        return operator.index(height), operator.index(width)
    except TypeError:
        _bad_levels("hold whole (h, w)", shapes)


def _bad_levels(must: str, shapes: Sequence[Any]) -> NoReturn:
    got = [tuple(shape) if isinstance(shape, Iterable) else shape for shape in shapes]
    raise ValueError(f"feat_shapes must {must}, got {got}")


# ---- ground truth


def ground_truth(targets: Sequence[Tensor], names: Sequence[str], like: Tensor) -> None:
    """Check the four fields of ``Targets``."""
    num_rows = targets[0].shape[:1] if isinstance(targets[0], Tensor) else ("N",)
    for place, (name, x) in enumerate(zip(names, targets, strict=True)):
        tensor(f"targets.{name}", x, (*num_rows, 4) if place > 1 else num_rows or ("N",), like=like, is_float=place > 1)
        if place < 2 and x.dtype != torch.int64:
            raise TypeError(f"targets.{name} must be int64, got {x.dtype}")


def exact_rows(argument: str, rows: Tensor, batch_size: int, num_classes: int) -> None:
    """Check that the type of raw rows can tell apart all images and classes."""
    limit = _WHOLE_UP_TO.get(rows.dtype)
    if limit is not None and (batch_size > limit + 1 or num_classes > limit + 1):
        raise ValueError(
            f"{argument} must be of a wider type than {rows.dtype}, which holds whole numbers up to {limit} exactly, "
            f"for {batch_size} images and {num_classes} classes"
        )


def is_whole(x: Tensor) -> Tensor:
    """Whether numbers are whole, as NaN and infinity are not."""
    return (x == x.round()) & x.isfinite()


def raw_rows(argument: str, rows: Tensor) -> None:
    """Check the values of rows (N, 6) in the YOLO convention, on the CPU; elsewhere that would synchronise."""
    if rows.device.type != "cpu" or len(rows) == 0:
        return
    numbers_, boxes = rows[:, :2], rows[:, 2:]
    is_broken = ~is_whole(numbers_)
    is_broken[:, 1] &= ~(numbers_[:, 0] < 0)  # the label of padding is nobody's business
    broken = numbers_[is_broken]
    require(broken.numel() == 0, argument, "have whole image indices and labels", broken[:5].tolist())
    limit = _WHOLE_UP_TO.get(rows.dtype)
    if limit is not None:
        largest = numbers_.max().item()
        require(largest <= limit, argument, f"have image indices and labels up to {limit} in {rows.dtype}", largest)
    largest_boxes = boxes[rows[:, 0] >= 0].abs().amax(1)
    if (largest_boxes > 10).sum() * 2 > len(largest_boxes):
        warn(
            f"{argument} have boxes up to {largest_boxes.max():.6g} images wide or away: rows are normalised to 0-1 of the "
            "image, and boxes in pixels go through triton_yolo.Targets"
        )


def pixel_boxes(argument: str, boxes: Tensor) -> None:
    """Warn if most boxes (n, 4) are shares of an image, not pixels."""
    largest = boxes.abs().amax(1)
    if (largest <= 1).sum() * 2 > len(largest):
        warn(
            f"{argument} are at most {largest.max():.6g} px wide or away: they are in pixels here, and boxes normalised to 0-1 "
            "of the image go through triton_yolo.Targets.from_yolo"
        )


def rows_in_range(
    image_index: Tensor, labels: Tensor, batch_size: int, num_classes: int, names: tuple[str, str] = ("targets", "targets")
) -> None:
    """Check the values of ground-truth rows on the CPU; elsewhere that would synchronise, and such rows are ignored."""
    if image_index.device.type != "cpu" or image_index.numel() == 0:
        return
    is_row = image_index >= 0
    largest = int(image_index.max())
    require(largest < batch_size, names[0], f"have image indices below the batch size {batch_size}", largest)
    wrong = labels[is_row & ((labels < 0) | (labels >= num_classes))]
    require(wrong.numel() == 0, names[1], f"have labels in 0...{num_classes - 1}", wrong[:5].long().tolist())


def targets(rows: Sequence[Tensor], batch_size: int, num_classes: int, names: tuple[str, str] = ("targets", "targets")) -> None:
    """Check the values of what operations take as targets, on the CPU."""
    if rows[0].device.type != "cpu":
        return
    if len(rows) == 1:
        raw_rows(names[0], rows[0])
        image_index, labels = rows[0][:, :2].double().unbind(1)  # a narrow type would round what they are compared with
        rows_in_range(image_index, labels, batch_size, num_classes, names)
    else:
        rows_in_range(rows[0], rows[1], batch_size, num_classes, names)
