"""Settings, ground truth, and what making outputs takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype

BY_ROW = ("rows", "targets", "gt_labels", "gt_boxes", "gt_keypoints", "gt_sizes", "mask_number", "masks")
"""Inputs with one entry a ground-truth row, of which every batch has another number."""


class ImageSize(NamedTuple):
    """Height and width of an image, each a whole number of some pixels: a compiled graph takes any number."""

    sides: tuple[int, ...]
    units: tuple[float, ...] = (1.0, 1.0)

    @property
    def pixels(self) -> tuple[float, float]:
        return self.sides[0] * self.units[0], self.sides[1] * self.units[1]


class Levels(NamedTuple):
    """Levels of a feature pyramid: sizes (h0, w0, h1, w1, ...) in cells, and the stride of each in pixels."""

    feat_shapes: tuple[int, ...]
    strides: tuple[float, ...]

    @property
    def imgsz(self) -> ImageSize:
        return ImageSize(self.feat_shapes[:2], self.strides[:1] * 2)

    @property
    def image_size(self) -> tuple[float, float]:
        """Height and width of the image in pixels."""
        return self.imgsz.pixels


class TaskAligned(NamedTuple):
    """Settings of the task-aligned assigner."""

    topk: int
    topk2: int | None
    alpha: float
    beta: float
    min_box_side: float
    eps: float


class SimOTA(NamedTuple):
    """Settings of SimOTA."""

    candidates: str
    radius: float


class GroundTruth(NamedTuple):
    """Rows (N,) in any order: image index, negative for padding, and label, int64; box (N, 4) as corners, and centre and size.

    Oriented boxes have the corners that they would have upright, and behind centre and size the angle: (N, 5).
    ``target_row`` (B, A) int32 of an assignment is the row of every anchor, or -1.
    """

    image_index: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    boxes_xywh: Tensor


class UnpackRows(NamedTuple):
    """Rows (N, 6) in the YOLO convention, or (N, 7) with an angle."""

    rows: Tensor
    imgsz: ImageSize

    def allocate(self) -> GroundTruth:
        return new_ground_truth([self.rows], working_dtype(self.rows.dtype))


def new_ground_truth(targets: list[Tensor], dtype: torch.dtype) -> GroundTruth:
    """Memory for what operations take as ``targets``: raw rows (N, 6 or 7), or the four fields of ``GroundTruth``."""
    boxes = targets[-1]
    box_size = boxes.shape[1] - 2 if len(targets) == 1 else boxes.shape[1]
    num_rows = boxes.shape[0]  # len() would make a constant of it, and every number of rows a new compile
    integers = boxes.new_empty(num_rows, dtype=torch.int64)
    corners = boxes.new_empty((num_rows, 4), dtype=dtype)
    return GroundTruth(integers, torch.empty_like(integers), corners, boxes.new_empty((num_rows, box_size), dtype=dtype))


def wider(*tensors: Tensor) -> torch.dtype:
    """The type that an operation on these computes in."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def held_gradient(x: Tensor) -> Tensor:
    """Memory for a gradient that is written before the loss's own is known: float16's is float32, for a loss scale to come."""
    return torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)


def of_anchors(like: Tensor, dtype: torch.dtype, *channels: int) -> Tensor:
    return like.new_empty((*like.shape[:2], *channels), dtype=dtype)
