"""Which rows count as ground truth, and which anchors have one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def is_valid(
    image_index: Tensor, labels: Tensor, boxes_xyxy: Tensor, boxes_xywh: Tensor, batch_size: int, num_classes: int,
    min_side: float = 0.0,
) -> Tensor:  # fmt: skip
    """Whether rows (N,) have an image of the batch, a class, finite corners and positive, finite sides.

    Oriented boxes also need a finite angle, and no side below ``min_side``.
    """
    low, high = boxes_xyxy.split(2, -1)
    sides = high - low
    in_batch = (image_index >= 0) & (image_index < batch_size)
    is_class = (labels >= 0) & (labels < num_classes)
    is_box = boxes_xyxy.isfinite().all(-1) & (sides.isfinite() & (sides > 0)).all(-1)
    if boxes_xywh.shape[-1] == 5:
        is_box = is_box & boxes_xywh[:, 4].isfinite() & (boxes_xywh[:, 2:4] >= min_side).all(-1)
    return in_batch & is_class & is_box


def is_matched(target_row: Tensor, image_index: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Whether the rows (B, A) of anchors are rows (N,) of their image and with a class."""
    image_index = image_index.where((labels >= 0) & (labels < num_classes), -1)
    image_index = F.pad(image_index, (0, 1), value=-1)  # what is no row is the last
    images = torch.arange(target_row.shape[0], device=target_row.device).unsqueeze(1)
    return image_index[target_row.long().clamp(-1, labels.shape[0])] == images
