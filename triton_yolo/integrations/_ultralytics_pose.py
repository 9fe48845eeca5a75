"""The pose criterion of Ultralytics' YOLOv8 and YOLO11, computed with this package's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..losses import YOLO11PoseLoss
from ._stock import BCE
from ._ultralytics_detect import BY_ROW, MEMBERS, Adapter, inputs_of, options_of, settings

_MEMBERS = {**MEMBERS, "keypoint_loss": ("ultralytics.utils.loss.KeypointLoss",), "bce_pose": (BCE,)}


def _settings(criterion: Any, *members: Any) -> dict[str, bool]:
    *of_boxes, _, bce_pose = members
    is_mean = bce_pose.reduction == "mean" and bce_pose.weight is None and bce_pose.pos_weight is None
    return {**settings(criterion, *of_boxes), "bce_pose": is_mean}


def _options(stock: Any) -> dict[str, Any]:
    sigmas, gains = stock.keypoint_loss.sigmas, stock.hyp
    version = None if sigmas.is_inference() else sigmas._version
    return {**options_of(stock), "sigmas": sigmas, "version": version, "pose_gain": gains.pose, "kobj_gain": gains.kobj}


def _make(*, sigmas: Tensor, version: int | None, **options: Any) -> YOLO11PoseLoss:
    """``version`` changes with the sigmas, which are read here alone, since that may synchronise."""
    return YOLO11PoseLoss(sigmas=sigmas.tolist(), **options)


def _inputs(preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
    *parts, shapes, rows = inputs_of(preds, batch, "boxes", "scores", "kpts")
    return *parts, shapes, rows, batch["keypoints"].to(rows.device, rows.dtype)


POSE = Adapter(
    _MEMBERS, _settings, _make, _options, _inputs, ("box", "pose", "kobj", "cls", "dfl"),
    columns=lambda stock: ((*BY_ROW, "keypoints"), ()),
)  # fmt: skip
