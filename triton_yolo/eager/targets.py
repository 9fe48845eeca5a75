"""Ground-truth rows, unpacked."""

import torch
from torch import Tensor

from .._precision import working


def unpack_rows(rows: Tensor, width: float, height: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_index, labels, *box = working(rows).unbind(-1)
    xywh = torch.stack([box[0] * width, box[1] * height, box[2] * width, box[3] * height], -1)
    centre, half = xywh[:, :2], xywh[:, 2:] / 2
    return image_index.long(), labels.long(), torch.cat([centre - half, centre + half], -1), xywh
