"""The mask term of YOLACT (arXiv 1904.02689) as YOLOv8 and YOLO11 have it: each positive's mask inside its target's box."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import working_precision
from .finite import poison


class MaskTargets(NamedTuple):
    """Ground-truth rows (N,): image, box (N, 4) in xyxy pixels; masks (B, H, W) of numbers from 1, or (N, H, W) one a row."""

    image_index: Tensor
    boxes: Tensor
    masks: Tensor
    overlap_mask: bool


def masks_of_rows(targets: MaskTargets) -> Tensor:
    """One mask a row (N, H, W). In an index image a row's number is its place among the rows of its image, from 1."""
    if not targets.overlap_mask:
        return targets.masks
    image_index = targets.image_index.tolist()
    places = [image_index[: row + 1].count(image) for row, image in enumerate(image_index)]
    shape = targets.masks.shape[1:]
    found = [
        targets.masks[image].double() == place if 0 <= image < len(targets.masks) else targets.masks.new_zeros(shape)
        for image, place in zip(image_index, places, strict=True)
    ]
    return torch.stack(found) if found else targets.masks.new_zeros(0, *shape)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels (P, h, w) count for boxes (P, 4) in pixels of the mask: an index of at least x1 and below x2."""
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    x = torch.arange(width, device=boxes.device)[None, None, :]
    y = torch.arange(height, device=boxes.device)[None, :, None]
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)


def mask_loss(
    pred_masks: Tensor,
    prototypes: Tensor,
    target_row: Tensor,
    targets: MaskTargets,
    *,
    imgsz: tuple[float, float],
    normaliser: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the masks of all positives, by the areas of their targets' boxes, over the number of positives: ().

    Coefficients (B, A, M) and prototypes (B, M, h, w), which are resized to the masks; rows (B, A) of anchors, -1 for none;
    size of the image in pixels. ``normaliser`` () takes the place of the number of positives.
    """
    coefficients, prototypes = working_precision(pred_masks), working_precision(prototypes)
    height, width = targets.masks.shape[1:]
    if prototypes.shape[2:] != (height, width):
        prototypes = F.interpolate(prototypes, (height, width), mode="bilinear")
    image, anchor = (target_row >= 0).nonzero(as_tuple=True)
    row = target_row[image, anchor].long()
    logits = torch.einsum("pm,pmhw->phw", coefficients[image, anchor], prototypes[image])
    scale = targets.boxes.new_tensor([width / imgsz[1], height / imgsz[0]] * 2)
    boxes = targets.boxes[row] * scale
    counts = inside(boxes, height, width)
    target = masks_of_rows(targets)[row].to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").where(counts, 0)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    total = (losses.sum((1, 2)) / area).sum() / (max(len(row), 1) if normaliser is None else normaliser)
    # A logit that is not finite and counts shows, whatever its target.
    is_finite = (logits.isfinite() | ~counts).all()
    return total + poison(is_finite, coefficients, prototypes)
