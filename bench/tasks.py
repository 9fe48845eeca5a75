"""What other tasks than detection add: instance masks, the term alone and in its criterion."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import triton_yolo as ty

from . import peers
from .cases import Case, masks_of, yolo11_preds
from .competitors import MIN_BOX_SIDE, OURS, Step, Target, ours
from .systems import target_row


def _term_ours(case: Case, target: Target) -> Step:
    masks, row = masks_of(case), target_row(case, min_box_side=MIN_BOX_SIDE).to(target.device)
    leaves = target.leaf(masks.coefficients), target.leaf(masks.prototypes)
    targets, images = ty.Targets.from_yolo(case.rows, case.imgsz).to(target.device), masks.images.to(target.device)
    least = 3 * sum(leaf.nbytes for leaf in leaves)

    def forward() -> Tensor:
        return ty.mask_loss(leaves[0].transpose(1, 2), leaves[1], row, targets, images, imgsz=case.imgsz)

    return Step(forward, leaves, target.device, least)


def _term_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-seg.yaml", case.num_classes).to(target.device).init_criterion()
    masks, row = masks_of(case), target_row(case, min_box_side=MIN_BOX_SIDE).to(target.device)
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


def _seg_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-seg.yaml", case.num_classes).to(target.device).init_criterion()
    dist, scores, coefficients, prototypes = leaves = tuple(map(target.leaf, (*yolo11_preds(case), *masks_of(case)[:2])))
    batch = {**peers.ultralytics_batch(case.rows.to(target.device)), "masks": masks_of(case).images.to(target.device)}
    preds = peers.ultralytics_preds(dist, scores, case.feat_shapes, mask_coefficient=coefficients, proto=prototypes)
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves, target.device)


TASKS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "mask_loss": {OURS: _term_ours, "ultralytics": _term_ultralytics},
    "yolo11-seg": {OURS: partial(ours, "yolo11-seg"), "ultralytics": _seg_ultralytics},
}
