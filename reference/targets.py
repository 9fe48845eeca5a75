"""YOLO rows to padded ground truth."""

from collections.abc import Callable

import torch
from torch import Tensor

from .boxes import working_precision, xywh_to_xyxy


def is_xywh_box(boxes: Tensor) -> Tensor:
    """``is_box`` of (..., 4) in xywh."""
    return is_box(xywh_to_xyxy(boxes))


def pad_targets(
    rows: Tensor, batch_size: int, imgsz: tuple[int, int], counts: Callable[[Tensor], Tensor] = is_xywh_box
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, 6) of (image, class, cx, cy, w, h) normalised -> labels (B, G), boxes xywh in pixels (B, G, 4), mask (B, G).

    The slot of a box is its order of appearance in its image. Padding rows and boxes of which ``counts`` is false get no slot.
    What follows the first four numbers of a box, its angle, stays as it is.
    """
    height, width = imgsz
    rows = working_precision(rows)
    boxes = torch.cat([rows[:, 2:6] * rows.new_tensor([width, height, width, height]), rows[:, 6:]], -1)
    kept = (rows[:, 0] >= 0) & counts(boxes)
    slots = [torch.nonzero(kept & (rows[:, 0] == image)).flatten() for image in range(batch_size)]
    num_slots = max((len(s) for s in slots), default=0)
    labels = torch.zeros(batch_size, num_slots, dtype=torch.long, device=rows.device)
    padded = boxes.new_zeros(batch_size, num_slots, boxes.shape[1])
    mask = torch.zeros(batch_size, num_slots, dtype=torch.bool, device=rows.device)
    for image, s in enumerate(slots):
        labels[image, : len(s)] = rows[s, 1].long()
        padded[image, : len(s)] = boxes[s]
        mask[image, : len(s)] = True
    return labels, padded, mask


def is_box(boxes: Tensor) -> Tensor:
    """Whether each box (..., 4) in xyxy has finite corners and two positive sides."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes.isfinite().all(-1) & sides.isfinite().all(-1) & (sides > 0).all(-1)
