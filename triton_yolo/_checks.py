"""Checks of arguments: clear errors, never a synchronisation.

What runs at every step looks at attributes and builds no text unless something is wrong: the text of a size would make a
constant of it in a compiled graph.
"""

import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._signatures import ImageSize

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
SIZES = (int, torch.SymInt)
_WHOLE_BELOW = {torch.float16: 2048, torch.bfloat16: 256}  # the first whole numbers that others are rounded to


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
    number = int(value)
    require(number >= least, argument, f"be at least {least}", number)
    require(number < 2**63, argument, "fit in 64 bits", number)
    return number


def boolean(argument: str, value: Any) -> bool:
    """True or False, of NumPy too; what else is true or not might be meant otherwise, as "False" is."""
    value = _on_host(argument, value)
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {value!r}")
    return value


def real(argument: str, value: Any, *, is_positive: bool = False) -> float:
    """A number of float32 that is not negative, or positive, of any kind that the host knows."""
    value = _on_host(argument, value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # of a whole one
        number = math.inf
    if not ((number > 0 if is_positive else number >= 0) and number <= _LARGEST):  # comparisons are all that a graph knows
        sign, kind = "positive" if is_positive else "not negative", " in float32" if _LARGEST < number < math.inf else ""
        raise ValueError(f"{argument} must be finite{kind} and {sign}, got {value}")
    return number


def _on_host(argument: str, value: Any) -> Any:
    """Numbers of NumPy's or of a tensor as Python's."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(f"{argument} must be numbers, since reading a tensor on {value.device} synchronises")
    # A number first, since a graph cannot ask a number of its own for an attribute.
    return value if isinstance(value, numbers.Number) or not hasattr(value, "tolist") else value.tolist()


def reals(argument: str, values: Iterable[Any]) -> tuple[float, ...]:
    """Positive numbers, one a level."""
    if not isinstance(values, Iterable) or (isinstance(values, Tensor) and values.dim() == 0):
        raise TypeError(f"{argument} must be a sequence, got {values!r}")
    result = tuple(real(argument, value, is_positive=True) for value in values)
    require(len(result) > 0, argument, "have one number a level", result)
    return result


def class_weights(argument: str, x: Tensor, num_classes: int) -> None:
    """Check weights (C,), on the CPU their values too."""
    tensor(argument, x, (num_classes,))
    require(not x.is_meta, argument, "have values", "a tensor on meta")
    if x.device.type == "cpu" and not ((x >= 0) & x.isfinite()).all():
        raise ValueError(f"{argument} must be finite and not negative, got {x.tolist()}")


def image_size(argument: str, value: Any) -> ImageSize:
    """Height and width from one number or two, of any kind that the host knows."""
    value = _on_host(argument, value)
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    require(len(sides) == 2, argument, "be (height, width) or one number", value)
    (height, y), (width, x) = _side(argument, sides[0]), _side(argument, sides[1])
    return ImageSize((height, width), (y, x))


def _side(argument: str, value: Any) -> tuple[Any, float]:
    """A side as a whole number of some pixels."""
    if isinstance(value, SIZES) and not isinstance(value, bool) and 0 < value < 2**63:
        return value, 1.0
    return 1, real(argument, value, is_positive=True)


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
    if is_float:
        if x.dtype not in FLOATS:
            raise TypeError(f"{argument} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    elif x.dtype.is_complex:
        raise TypeError(f"{argument} must be real, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{argument} must be on {like.device}, got {x.device}")


def boxes(argument: str, x: Tensor, like: Tensor | None = None, *, size: int = 4) -> None:
    """Check boxes (..., ``size``)."""
    rank = x.dim() if isinstance(x, Tensor) else 1
    tensor(argument, x, (*["..."] * (rank - 1), size), like=like)


def per_slot(argument: str, x: Tensor, like: Tensor) -> Tensor:
    """Check one value a ground-truth slot, (B, G) or (B, G, 1) as ``like`` (B, G, ...) has them, and return (B, G)."""
    shape = like.shape[:2]
    is_column = isinstance(x, Tensor) and x.dim() == 3
    tensor(argument, x, (*shape, 1) if is_column else shape, like=like, is_float=False)
    return x.reshape(shape)


# ---- ground truth


def rows(argument: str, x: Tensor) -> None:
    """Check rows of upright or oriented boxes in the YOLO convention."""
    tensor(argument, x, ("N", 7 if isinstance(x, Tensor) and x.shape[-1:] == (7,) else 6))


def mappings(argument: str, values: Iterable[Mapping[str, T]]) -> list[Mapping[str, T]]:
    """Mappings, one an image, at least one."""
    if not isinstance(values, Iterable) or isinstance(values, Mapping | Tensor):
        raise TypeError(f"{argument} must be a sequence of mappings, one an image, got {type(values).__name__}")
    result = list(values)
    require(len(result) > 0, argument, "have one mapping an image", "an empty list")
    for image, value in enumerate(result):
        if not isinstance(value, Mapping):
            raise TypeError(f"{argument}[{image}] must be a mapping, got {type(value).__name__}")
    return result


def ground_truth(targets: Sequence[Tensor], names: Sequence[str], like: Tensor, box_size: int = 4) -> None:
    """Check the four fields of ``Targets``, of which the last has ``box_size`` numbers a box."""
    if getattr(targets, "_fields", None) != names:
        raise TypeError(f"targets must be triton_yolo.Targets, which from_yolo makes of rows, got {type(targets).__name__}")
    num_rows: int | str = "N"
    sizes = (), (), (4,), (box_size,)
    for place, (name, x) in enumerate(zip(names, targets, strict=True)):
        tensor(f"targets.{name}", x, (num_rows, *sizes[place]), like=like, is_float=False)
        if place < 2 and x.dtype != torch.int64:
            raise TypeError(f"targets.{name} must be int64, got {x.dtype}")
        if place > 1 and x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"targets.{name} must be float32 or float64, got {x.dtype}")
        num_rows = x.shape[0]


def exact(argument: str, x: Tensor, batch_size: int, num_classes: int) -> None:
    """Check that the type of indices and labels can tell apart all images and classes."""
    limit = _WHOLE_BELOW.get(x.dtype)
    if limit is not None and (batch_size > limit or num_classes > limit):
        raise ValueError(
            f"{argument} must be of a wider type than {x.dtype}, which rounds whole numbers from {limit} on, "
            f"for {batch_size} images and {num_classes} classes"
        )


def whole_values(argument: str, what: str, values: Tensor) -> None:
    """Check indices or labels of any type, on the CPU."""
    if not values.is_floating_point():
        return
    broken = values[(values != values.round()) | ~values.isfinite()]  # NaN is not equal to itself
    require(broken.numel() == 0, argument, f"have whole {what}", broken[:5].tolist())
    limit = _WHOLE_BELOW.get(values.dtype)
    if limit is not None and values.numel():
        largest = values.max().item()
        require(largest < limit, argument, f"have {what} below {limit}, where {values.dtype} begins to round", largest)


def raw_rows(argument: str, rows: Tensor) -> None:
    """Check the values of rows in the YOLO convention, on the CPU; elsewhere that would synchronise."""
    if rows.device.type != "cpu" or len(rows) == 0:
        return
    is_row = rows[:, 0] >= 0
    whole_values(argument, "image indices", rows[:, 0])
    whole_values(argument, "labels", rows[is_row, 1])
    largest_boxes = rows[is_row, 2:6].abs().amax(1)
    if (largest_boxes > 10).sum() * 2 > len(largest_boxes):
        warn(
            f"{argument} have boxes up to {largest_boxes.max():.6g} images wide or away: rows are normalised to 0-1 of the "
            "image, and boxes in pixels go through triton_yolo.Targets.from_list or from_padded"
        )


def pixel_boxes(argument: str, boxes: Tensor) -> None:
    """Warn if most boxes (n, 4) are shares of an image, not pixels."""
    largest = boxes.abs().amax(1)
    if (largest <= 1).sum() * 2 > len(largest):
        warn(
            f"{argument} are at most {largest.max():.6g} px wide or away: they are in pixels here, and boxes normalised to 0-1 "
            "of the image go through triton_yolo.Targets.from_yolo"
        )


def keypoint_places(argument: str, keypoints: Tensor, is_normalised: bool) -> None:
    """Warn on the CPU if most keypoints (N, K, 2 or 3) are pixels where shares of an image are meant, or shares for pixels."""
    if keypoints.device.type != "cpu" or torch.compiler.is_compiling() or type(keypoints) is not Tensor:
        return
    largest = keypoints[..., :2].amax(-1)
    known = largest[largest > 0]  # padding, and what stands for unseen ones, is not
    if is_normalised and (known > 10).sum() * 2 > len(known):
        warn(
            f"{argument} are up to {known.max():.6g} images away: beside normalised rows they are shares (0-1) of the image, "
            "too, and those in pixels go with triton_yolo.Targets"
        )
    if not is_normalised and (known <= 1).sum() * 2 > len(known):
        warn(f"{argument} are at most {known.max():.6g} px away: beside boxes in pixels they are in pixels, too")


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
    require(wrong.numel() == 0, names[1], f"have labels in 0...{num_classes - 1}", [int(label) for label in wrong[:5].tolist()])


def target_row(argument: str, x: Tensor, like: Tensor) -> None:
    """Check the type and size of an assignment of anchors (B, A) to rows."""
    tensor(argument, x, tuple(like.shape[:2]), like=like, is_float=False)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{argument} must be int32 or int64, got {x.dtype}")


def matched_rows(argument: str, rows: Tensor, is_matched: Tensor) -> None:
    """Check on the CPU, but for a graph, that rows (B, A) that are not negative are those of targets."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or type(rows) is not Tensor:
        return
    wrong = rows[(rows >= 0) & ~is_matched]
    require(wrong.numel() == 0, argument, "be rows of targets with the anchor's image and a class", wrong[:5].tolist())


def rows_below(argument: str, rows: Tensor, number: int) -> None:
    """Check on the CPU, but for a graph, that there are all rows (B, A)."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or type(rows) is not Tensor:
        return
    wrong = rows[rows >= number]
    require(wrong.numel() == 0, argument, f"be below the number of rows {number}", wrong[:5].tolist())


def targets(rows: Sequence[Tensor], batch_size: int, num_classes: int, names: tuple[str, str] = ("targets", "targets")) -> None:
    """Check the values of what operations take as targets, on the CPU."""
    if rows[0].device.type != "cpu":
        return
    if len(rows) == 1:
        raw_rows(names[0], rows[0])
        rows_in_range(rows[0][:, 0], rows[0][:, 1], batch_size, num_classes, names)
    else:
        rows_in_range(rows[0], rows[1], batch_size, num_classes, names)
