"""Ground-truth rows, unpacked."""

import torch
from torch import Tensor

from .._precision import working
from .._signatures import GroundTruth, Levels, UnpackRows, new_ground_truth


def unpack_rows(x: UnpackRows) -> GroundTruth:
    image_index, labels, *box = working(x.rows).unbind(-1)
    height, width = x.imgsz.pixels
    xywh = torch.stack([box[0] * width, box[1] * height, box[2] * width, box[3] * height, *box[4:]], -1)
    centre, half = xywh[:, :2], xywh[:, 2:4] / 2
    image, label = image_index.long(), labels.long()
    image = image.where((image == image_index) & (label == labels), -1)  # a row without whole numbers is padding
    return GroundTruth(image, label, torch.cat([centre - half, centre + half], -1), xywh)


def ground_truth(targets: list[Tensor], levels: Levels, dtype: torch.dtype) -> GroundTruth:
    """Targets as operations take them, boxes in this type. A copy: what an operation puts out must not be what it was given."""
    if len(targets) == 1:
        return unpack_rows(UnpackRows(targets[0].to(dtype), levels.imgsz))
    copies = new_ground_truth(targets, dtype)
    return GroundTruth(*[copy.copy_(x) for copy, x in zip(copies, targets, strict=True)])
