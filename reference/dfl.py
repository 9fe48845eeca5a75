"""Distances as distributions over bins (Generalized Focal Loss, arXiv 2006.04388)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import working_precision


def expected_distances(pred_dist: Tensor, reg_max: int) -> Tensor:
    """Softmax expectation over ``reg_max`` bins for each side: (..., 4R) logits to (..., 4) cells."""
    logits = working_precision(pred_dist).unflatten(-1, (4, reg_max))
    if reg_max == 1:
        return logits.squeeze(-1)
    bins = torch.arange(reg_max, dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-1) * bins).sum(-1)


def decode_dfl(pred_dist: Tensor, anchor_points: Tensor, *, reg_max: int = 16, strides: Tensor | None = None) -> Tensor:
    """Boxes (B, A, 4) in cells, or in pixels if ``strides`` (A,) are given."""
    left_top, right_bottom = expected_distances(pred_dist, reg_max).chunk(2, -1)
    points = anchor_points.to(left_top.dtype)
    boxes = torch.cat([points - left_top, points + right_bottom], -1)
    return boxes if strides is None else boxes * strides.to(boxes.dtype)[:, None]


def distances_to_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) from ``points`` (..., 2) to the sides of ``boxes`` (..., 4)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def dfl_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss of ``logits`` (M, 4, R) for ``distances`` (M, 4) in cells: mean over the sides, (M,)."""
    reg_max = logits.shape[-1]
    distances = distances.clamp(0, reg_max - 1 - 0.01)
    low = distances.floor()
    log_p = F.log_softmax(logits, -1)
    cross_entropy = -torch.stack([log_p.gather(-1, low.long()[..., None] + i).squeeze(-1) for i in (0, 1)], -1)
    weights = torch.stack([low + 1 - distances, distances - low], -1)
    # Of a bin without a weight even an infinite cross entropy counts 0.
    return torch.where(weights > 0, cross_entropy * weights, torch.zeros_like(weights)).sum(-1).mean(-1)
