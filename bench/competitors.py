"""The implementations of a criterion, each on predictions in the layout native to it."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

import reference
import triton_yolo as ty
from tests import peers

from .cases import STRIDES, Case, yolo11_preds, yolox_preds

OURS = "triton_yolo"
MIN_BOX_SIDE = float(STRIDES[1])  # as in Ultralytics


class Step(NamedTuple):
    """One training step's criterion: ``forward`` returns the loss, whose gradient goes to ``leaves``."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


class Target(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    def leaf(self, preds: Tensor) -> Tensor:
        return preds.to(self.device, self.dtype).contiguous().requires_grad_()


def _yolo11(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    dist, scores = (x.transpose(1, 2) for x in leaves)
    rows = case.rows.to(target.device)
    return Step(lambda: criterion(dist, scores, case.feat_shapes, rows).loss, leaves)


def _yolo11_ours(case: Case, target: Target) -> Step:
    return _yolo11(ty.YOLO11Loss(case.num_classes, strides=STRIDES, min_box_side=MIN_BOX_SIDE), case, target)


def _yolo11_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = torch.compile(reference.yolo11_loss) if is_compiled else reference.yolo11_loss
    return _yolo11(partial(criterion, strides=STRIDES, min_box_side=MIN_BOX_SIDE), case, target)


def _yolo11_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n.yaml", case.num_classes).to(target.device).init_criterion()
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    batch = peers.ultralytics_batch(case.rows.to(target.device))
    preds = peers.ultralytics_preds(*leaves, case.feat_shapes)
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves)


def _yolox(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    preds, rows = target.leaf(yolox_preds(case)), case.rows.to(target.device)
    return Step(lambda: criterion(preds, case.feat_shapes, rows).loss, (preds,))


def _yolox_ours(case: Case, target: Target) -> Step:
    return _yolox(ty.YOLOXLoss(case.num_classes, strides=STRIDES), case, target)


def _yolox_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = torch.compile(reference.yolox_loss) if is_compiled else reference.yolox_loss
    return _yolox(partial(criterion, strides=STRIDES), case, target)


def _yolox_peer(case: Case, target: Target) -> Step:
    head = peers.yolox_head(case.num_classes, STRIDES).to(target.device)
    preds = target.leaf(yolox_preds(case))
    labels = peers.yolox_labels(case.rows, case.batch_size, (case.imgsz, case.imgsz)).to(target.device)
    return Step(lambda: peers.yolox_losses(head, preds, case.feat_shapes, labels)[0], (preds,))


COMPETITORS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "yolo11": {
        OURS: _yolo11_ours,
        "ultralytics": _yolo11_ultralytics,
        "reference": _yolo11_reference,
        "torch.compile(reference)": partial(_yolo11_reference, is_compiled=True),
    },
    "yolox": {
        OURS: _yolox_ours,
        "pixeltable-yolox": _yolox_peer,
        "reference": _yolox_reference,
        "torch.compile(reference)": partial(_yolox_reference, is_compiled=True),
    },
}


def label(name: str) -> str:
    """The name with the version if it is a package."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
