"""The criteria: how each is called, on which inputs, and the fewest bytes that it moves."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_yolo as ty

from .cases import STRIDES, Case, keypoints_of, masks_of, oriented_of, yolo11_preds, yolox_preds

LAYOUTS = ("channels first", "channels last")


class Inputs(NamedTuple):
    """Predictions (B, channels, A) of every anchor, those that are maps, and ground truth: rows first."""

    preds: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]


class Call(NamedTuple):
    """A criterion with the predictions, which are leaves, and the ground truth of a batch."""

    criterion: Callable[..., Any]
    leaves: tuple[Tensor, ...]
    feat_shapes: list[tuple[int, int]]
    truth: tuple[Tensor, ...]

    def __call__(self) -> Any:
        return self.criterion(*self.leaves, self.feat_shapes, *self.truth)


class System(NamedTuple):
    """A criterion of the package by its name, which an older version need not have; what it takes, and what it moves at least.

    ``least`` says that of a case and the size of a number.
    """

    name: str
    inputs: Callable[[Case], Inputs]
    least: Callable[[Case, int], int]

    def criterion(self, case: Case, **options: Any) -> Any:
        if self.name != "YOLOXLoss":
            options["reg_max"] = case.reg_max
        return getattr(ty, self.name)(case.num_classes, strides=STRIDES, **options)

    def call(
        self, case: Case, dtype: torch.dtype, layout: str = LAYOUTS[0], device: torch.device | str = "cpu", **options: Any
    ) -> Call:
        preds, maps, truth = self.inputs(case)
        preds = tuple(x.to(device, dtype).transpose(1, 2) for x in preds)
        if layout == "channels last":
            preds = tuple(x.contiguous() for x in preds)
        leaves = tuple(x.detach().requires_grad_() for x in (*preds, *(x.to(device, dtype) for x in maps)))
        criterion = self.criterion(case, **options).to(device)
        return Call(criterion, leaves, case.feat_shapes, tuple(x.to(device) for x in truth))


def least_bytes(system: str, case: Case, itemsize: int) -> int:
    """The fewest bytes that a criterion moves forward and backward; ground truth, a few numbers a row, is not in it."""
    return SYSTEMS[system].least(case, itemsize)


# ---- inputs


def _yolo11(case: Case) -> Inputs:
    return Inputs(yolo11_preds(case), (), (case.rows,))


def _yolox(case: Case) -> Inputs:
    return Inputs((yolox_preds(case).transpose(1, 2).contiguous(),), (), (case.rows,))


def _oriented(case: Case) -> Inputs:
    rows, *preds = oriented_of(case)
    return Inputs(tuple(preds), (), (rows,))


def _segmentation(case: Case) -> Inputs:
    coefficients, prototypes, images = masks_of(case)
    return Inputs((*yolo11_preds(case), coefficients), (prototypes,), (case.rows, images))


def _pose(case: Case) -> Inputs:
    raw, keypoints = keypoints_of(case)
    return Inputs((*yolo11_preds(case), raw), (), (case.rows, keypoints))


# ---- bytes


def _least_yolo11(case: Case, itemsize: int) -> int:
    """Every logit is read once, and its gradient written."""
    return itemsize * case.num_anchors * 2 * (4 * case.reg_max + case.num_classes)


def _least_yolox(case: Case, itemsize: int) -> int:
    """The output is read twice, and its gradient written."""
    return itemsize * case.num_anchors * 3 * (5 + case.num_classes)


def _least_oriented(case: Case, itemsize: int) -> int:
    """Every logit and angle is read once, and its gradient written."""
    return _least_yolo11(case, itemsize) + itemsize * case.num_anchors * 2


def _least_segmentation(case: Case, itemsize: int) -> int:
    """Beside the detector's, of positives the coefficients are read, and of pixels inside their boxes prototypes and masks,
    once. Gradients of all coefficients and prototypes are written.
    """
    masks, row = masks_of(case), target_row(case)
    channels, sides = masks.prototypes.shape[1], masks.prototypes.shape[2:]
    covered, boxes = torch.zeros(case.batch_size, *sides, dtype=torch.bool), ty.Targets.from_yolo(case.rows, case.imgsz)
    edges = (boxes.boxes_xyxy * (sides[0] / case.imgsz)).ceil().int()
    for i in row[row >= 0].unique().tolist():
        x1, y1, x2, y2 = edges[i].tolist()
        covered[int(boxes.image_index[i]), y1:y2, x1:x2] = True
    read = channels * (int((row >= 0).sum()) + int(covered.sum()))
    written = masks.coefficients.numel() + masks.prototypes.numel()
    return _least_yolo11(case, itemsize) + itemsize * (read + written) + masks.images.element_size() * int(covered.sum())


def _least_pose(case: Case, itemsize: int) -> int:
    """Beside the detector's, keypoints of positives are read, and gradients of all written."""
    raw, _ = keypoints_of(case)
    return _least_yolo11(case, itemsize) + itemsize * (raw.numel() + raw.shape[1] * int((target_row(case) >= 0).sum()))


@lru_cache(maxsize=2)
def target_row(case: Case, **options: Any) -> Tensor:
    """The row (B, A) of ground truth that our detector's criterion gives to every anchor, -1 for background."""
    with ty.backend("eager"):
        call = SYSTEMS["yolo11"].call(case, torch.float32, **options)
        preds = {name: x.detach() for name, x in zip(("pred_dist", "pred_scores"), call.leaves, strict=True)}
        return call.criterion._with_rows(*call.criterion._checked(preds, call.feat_shapes), *call.truth)[1]


SYSTEMS = {
    "yolo11": System("YOLO11Loss", _yolo11, _least_yolo11),
    "yolox": System("YOLOXLoss", _yolox, _least_yolox),
    "yolo11-obb": System("YOLO11OBBLoss", _oriented, _least_oriented),
    "yolo11-seg": System("YOLO11SegmentationLoss", _segmentation, _least_segmentation),
    "yolo11-pose": System("YOLO11PoseLoss", _pose, _least_pose),
}
