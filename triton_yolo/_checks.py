"""Checks of arguments: clear errors, never a synchronisation."""

import warnings
from collections.abc import Iterable, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, argument: str, must: str, got: object) -> None:
    """Raise a ValueError that names the argument, what it must be and what it was."""
    if not condition:
        raise ValueError(f"{argument} must {must}, got {got}")


def one_of(argument: str, value: T, allowed: Sequence[T]) -> T:
    require(value in allowed, argument, f"be one of {', '.join(map(repr, allowed))}", repr(value))
    return value


def at_least(argument: str, value: float, least: float) -> None:
    require(value >= least, argument, f"be at least {least}", value)


def sequence(argument: str, values: Iterable[T]) -> tuple[T, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{argument} must be a sequence, got {values!r}")
    return tuple(values)


def tensor(argument: str, x: Tensor, shape: Sequence[int | str], *, like: Tensor | None = None, is_float: bool = True) -> None:
    """Check rank, sizes (a string stands for any size), type and, against ``like``, the device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(x).__name__}")
    expected = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    fits = x.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    require(fits, argument, f"have shape {expected}", tuple(x.shape))
    if is_float and x.dtype not in FLOATS:
        raise TypeError(f"{argument} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if like is not None:
        require(x.device == like.device, argument, f"be on {like.device}", x.device)


def per_slot(argument: str, x: Tensor, like: Tensor) -> Tensor:
    """Check one value a ground-truth slot, (B, G) or (B, G, 1) as ``like`` (B, G, ...) has them, and return (B, G)."""
    shape = tuple(like.shape[:2])
    is_column = isinstance(x, Tensor) and x.dim() == 3
    tensor(argument, x, (*shape, 1) if is_column else shape, like=like, is_float=False)
    return x.reshape(shape)


def levels(
    feat_shapes: Sequence[Sequence[int]], strides: Sequence[float], num_anchors: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Check the levels and return (h0, w0, h1, w1, ...) and the strides as the operators take them."""
    require(len(feat_shapes) > 0, "feat_shapes", "have at least one level", len(feat_shapes))
    require(len(feat_shapes) == len(strides), "feat_shapes", f"have one (h, w) for each of the {len(strides)} strides",
            len(feat_shapes))  # fmt: skip
    for shape in feat_shapes:
        require(len(shape) == 2 and min(shape) >= 1, "feat_shapes", "hold positive (h, w)", tuple(shape))
    for stride in strides:
        require(stride > 0, "strides", "be positive", stride)
    if num_anchors is not None:
        total = sum(prod(shape) for shape in feat_shapes)
        require(total == num_anchors, "feat_shapes", f"have as many cells as the predictions have anchors ({num_anchors})",
                f"{total} from {[tuple(s) for s in feat_shapes]}")  # fmt: skip
    return tuple([side for shape in feat_shapes for side in shape]), tuple([float(s) for s in strides])


def targets(rows: list[Tensor], batch_size: int, num_classes: int) -> None:
    """Check the values of what operations take as targets, on the CPU."""
    if rows[0].device.type != "cpu":
        return
    if len(rows) == 1:
        normalised_rows(rows[0])
        rows_in_range(rows[0][:, 0], rows[0][:, 1], batch_size, num_classes)
    else:
        rows_in_range(rows[0], rows[1], batch_size, num_classes)


def normalised_rows(rows: Tensor) -> None:
    """Warn on the CPU if most rows (N, 6) in the YOLO convention can't be normalised; elsewhere that would synchronise."""
    if rows.device.type != "cpu":
        return
    largest = rows[rows[:, 0] >= 0, 2:].abs().amax(1)
    if (largest > 10).sum() * 2 > len(largest):
        warnings.warn(
            f"targets have boxes up to {largest.max():.6g} images wide or away: rows are normalised to 0-1 of the image, "
            "and boxes in pixels go through triton_yolo.Targets",
            stacklevel=2,
        )


def rows_in_range(image_index: Tensor, labels: Tensor, batch_size: int, num_classes: int) -> None:
    """Check the values of ground-truth rows on the CPU; elsewhere that would synchronise, and such rows are ignored."""
    if image_index.device.type != "cpu" or image_index.numel() == 0:
        return
    is_row = image_index >= 0
    largest = int(image_index.max())
    require(largest < batch_size, "targets", f"have image indices below the batch size {batch_size}", largest)
    wrong = labels[is_row & ((labels < 0) | (labels >= num_classes))]
    require(wrong.numel() == 0, "targets", f"have labels in 0...{num_classes - 1}", wrong[:5].tolist())
