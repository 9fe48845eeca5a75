"""What other tasks than detection add: instance masks, the term alone and in its criterion."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import triton_yolo as ty

from . import peers
from .cases import STRIDES, Case, yolo11_preds
from .competitors import MIN_BOX_SIDE, OURS, Step, Target

_CHANNELS, _PIXEL = 32, 4  # prototypes, and px a pixel of them


class Masks(NamedTuple):
    """Coefficients (B, M, A), prototypes (B, M, h, w), images of numbers (B, h, w)."""

    coefficients: Tensor
    prototypes: Tensor
    images: Tensor


@lru_cache(maxsize=2)
def masks_of(case: Case) -> Masks:
    """An ellipse in every box, the later rows in front; predictions that know nothing."""
    generator = torch.Generator().manual_seed(2)
    side, num_anchors = case.imgsz // _PIXEL, sum(height * width for height, width in case.feat_shapes)
    coefficients = torch.randn(case.batch_size, _CHANNELS, num_anchors, generator=generator)
    prototypes = torch.randn(case.batch_size, _CHANNELS, side, side, generator=generator) / 4
    images = torch.zeros(case.batch_size, side, side, dtype=torch.int16)
    centre, counts = (torch.arange(side) + 0.5) / side, [0] * case.batch_size
    for image, _, x, y, width, height in case.rows.tolist():
        counts[int(image)] += 1
        ellipse = ((centre[None, :] - x) / width) ** 2 + ((centre[:, None] - y) / height) ** 2 < 0.25
        images[int(image)][ellipse] = counts[int(image)]
    return Masks(coefficients, prototypes, images)


def _criterion(case: Case) -> ty.YOLO11SegmentationLoss:
    return ty.YOLO11SegmentationLoss(case.num_classes, strides=STRIDES, reg_max=case.reg_max, min_box_side=MIN_BOX_SIDE)


@lru_cache(maxsize=2)
def _target_row(case: Case) -> Tensor:
    """The rows (B, A) of our assignment."""
    preds = (x.transpose(1, 2) for x in yolo11_preds(case))
    return _criterion(case).detection._with_rows(*preds, case.feat_shapes, case.rows)[1]


def _term_ours(case: Case, target: Target) -> Step:
    masks, row = masks_of(case), _target_row(case).to(target.device)
    leaves = target.leaf(masks.coefficients), target.leaf(masks.prototypes)
    targets, images = ty.Targets.from_yolo(case.rows, case.imgsz).to(target.device), masks.images.to(target.device)
    least = 3 * sum(leaf.nbytes for leaf in leaves)

    def forward() -> Tensor:
        return ty.mask_loss(leaves[0].transpose(1, 2), leaves[1], row, targets, images, imgsz=case.imgsz)

    return Step(forward, leaves, target.device, least)


def _term_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-seg.yaml", case.num_classes).to(target.device).init_criterion()
    masks, row = masks_of(case), _target_row(case).to(target.device)
    leaves = target.leaf(masks.coefficients), target.leaf(masks.prototypes)
    rows, images = case.rows.to(target.device), masks.images.to(target.device).float()
    firsts = torch.searchsorted(rows[:, 0].contiguous(), torch.arange(case.batch_size, dtype=rows.dtype, device=target.device))
    slot = torch.where(row >= 0, row - firsts[:, None], 0)
    boxes = ty.Targets.from_yolo(rows, case.imgsz).boxes_xyxy[row.clamp(min=0).long()]
    size = torch.tensor([case.imgsz, case.imgsz], dtype=rows.dtype, device=target.device)

    def forward() -> Tensor:
        return criterion.calculate_segmentation_loss(
            row >= 0, images, slot, boxes, rows[:, :1], leaves[1], leaves[0].transpose(1, 2), size
        )  # fmt: skip

    return Step(forward, leaves, target.device)


def _seg_leaves(case: Case, target: Target) -> tuple[Tensor, ...]:
    return tuple(map(target.leaf, (*yolo11_preds(case), *masks_of(case)[:2])))


def _seg_ours(case: Case, target: Target) -> Step:
    criterion, leaves = _criterion(case), _seg_leaves(case, target)
    rows, images = case.rows.to(target.device), masks_of(case).images.to(target.device)

    def forward() -> Tensor:
        preds = (x.transpose(1, 2) for x in leaves[:3])
        return criterion(*preds, leaves[3], case.feat_shapes, rows, images).loss

    return Step(forward, leaves, target.device)


def _seg_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-seg.yaml", case.num_classes).to(target.device).init_criterion()
    dist, scores, coefficients, prototypes = leaves = _seg_leaves(case, target)
    batch = {**peers.ultralytics_batch(case.rows.to(target.device)), "masks": masks_of(case).images.to(target.device)}
    preds = peers.ultralytics_preds(dist, scores, case.feat_shapes, mask_coefficient=coefficients, proto=prototypes)
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves, target.device)


TASKS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "mask_loss": {OURS: _term_ours, "ultralytics": _term_ultralytics},
    "yolo11-seg": {OURS: _seg_ours, "ultralytics": _seg_ultralytics},
}
