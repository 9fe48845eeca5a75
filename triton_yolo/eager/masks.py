"""The mask term of instance segmentation: positives of one row at a time, and of the prototypes what its box covers."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._signatures import MaskLoss, MaskLossOutputs
from .memory import untouched_zeros_like

_LOGITS = 1 << 18  # that are held at once


class _Part(NamedTuple):
    """Anchors (P,) with the same row of an image, that row, the pixels of its box, and 1 over the area of that."""

    anchors: Tensor
    row: int
    place: tuple[slice, slice]
    weight: float


class _Image(NamedTuple):
    """An image and its positives. Prototypes (h, w, M) are pixel by pixel: what a box covers has long pieces of memory."""

    number: int
    parts: list[_Part]

    def prototypes(self, x: MaskLoss, dtype: torch.dtype) -> Tensor:
        return x.prototypes[self.number].permute(1, 2, 0).to(dtype).contiguous()

    def mask(self, x: MaskLoss, part: _Part, dtype: torch.dtype) -> Tensor:
        """What belongs to the pixels of a part."""
        held = x.masks[self.number if x.overlap_mask else part.row][part.place].flatten().to(dtype)
        return (held == x.mask_number[part.row]).to(dtype) if x.overlap_mask else held


def mask_loss(x: MaskLoss) -> MaskLossOutputs:
    loss, *outputs = x.allocate()
    scale, total = x.scale.item(), 0.0
    grads = [untouched_zeros_like(grad) for grad in outputs]
    for image in _images(x):
        prototypes = image.prototypes(x, loss.dtype)
        sums = torch.zeros_like(prototypes) if x.wants_grad else None
        for part in image.parts:
            seen = prototypes[part.place].flatten(0, 1)
            coefficients = x.coefficients[image.number, part.anchors].to(loss.dtype)
            logits = coefficients @ seen.T
            mask = image.mask(x, part, loss.dtype).expand_as(logits)
            total += part.weight * _cross_entropy(logits, mask).item()
            if sums is not None:
                error = logits.sigmoid_().sub_(mask).mul_(scale * part.weight)
                grads[0][image.number, part.anchors] = (error @ seen).to(grads[0].dtype)
                region = sums[part.place]
                region += (error.T @ coefficients).view_as(region)
        if sums is not None:
            grads[1][image.number] = sums.permute(2, 0, 1)
    if math.isnan(scale) or (not math.isfinite(total) and not _are_logits_finite(x, loss.dtype)):
        return MaskLossOutputs(*[out.fill_(torch.nan) for out in (loss, *grads)])
    return MaskLossOutputs(loss.fill_(scale * total), *grads)


def _cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """The sum over all logits. The difference comes first, so that a small loss of a large logit keeps its digits."""
    over = logits.clamp(min=0).addcmul_(logits, mask, value=-1)
    return over.sum() + F.softplus(logits.abs().neg_()).sum()


def _are_logits_finite(x: MaskLoss, dtype: torch.dtype) -> bool:
    for image in _images(x):
        prototypes = image.prototypes(x, dtype)
        for part in image.parts:
            logits = x.coefficients[image.number, part.anchors].to(dtype) @ prototypes[part.place].flatten(0, 1).T
            if not logits.isfinite().all():
                return False
    return True


def _images(x: MaskLoss) -> Iterator[_Image]:
    """The positives whose boxes have pixels, an image at a time, row by row; no part has many more than ``_LOGITS`` logits."""
    images, anchors = (x.target_row >= 0).nonzero().unbind(1)
    rows = x.target_row[images, anchors].long()
    order = (images * (len(x.gt_boxes) + 1) + rows).argsort(stable=True)
    images, anchors, rows = images[order], anchors[order], rows[order]
    pairs, counts = torch.stack([images, rows]).unique_consecutive(dim=1, return_counts=True)
    bounds, weights = _rectangles(x, pairs[1])
    parts: dict[int, list[_Part]] = {}
    start = 0
    for (image, row), count, (x1, y1, x2, y2), weight in zip(
        pairs.T.tolist(), counts.tolist(), bounds.tolist(), weights.tolist(), strict=True
    ):  # fmt: skip
        if x1 < x2 and y1 < y2:
            place = slice(y1, y2), slice(x1, x2)
            for some in anchors[start : start + count].split(max(1, _LOGITS // ((x2 - x1) * (y2 - y1)))):
                parts.setdefault(image, []).append(_Part(some, row, place, weight))
        start += count
    return itertools.starmap(_Image, parts.items())


def _rectangles(x: MaskLoss, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels x1, y1, x2, y2 (n, 4) of the boxes of ``rows``, the last two not in it any more, and 1 over their areas (n,)."""
    height, width = x.prototypes.shape[2:]
    boxes = x.gt_boxes[rows] * x.gt_boxes.new_tensor(x.pixels_a_px * 2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return boxes.ceil().clamp(min=0).minimum(boxes.new_tensor([width, height, width, height])).long(), 1 / area
