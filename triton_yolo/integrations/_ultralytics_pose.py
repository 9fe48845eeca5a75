"""The pose criterion of Ultralytics' YOLOv8 and YOLO11, computed with this package's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..losses import YOLO11PoseLoss
from ._stock import BCE
from ._ultralytics_detect import BY_ROW, MEMBERS, Adapter, inputs_of, numbers, options_of, settings

_MEMBERS = {**MEMBERS, "keypoint_loss": ("ultralytics.utils.loss.KeypointLoss",), "bce_pose": (BCE,)}


def _settings(criterion: Any, *members: Any) -> dict[str, bool]:
    *of_boxes, _, bce_pose = members
    is_mean = bce_pose.reduction == "mean" and bce_pose.weight is None and bce_pose.pos_weight is None
    sigmas = criterion.keypoint_loss.sigmas
    of_keypoints = {"bce_pose": is_mean, "keypoint_loss": sigmas.ndim == 1 and not sigmas.requires_grad}
    return {**settings(criterion, *of_boxes), **of_keypoints}


def _options(stock: Any) -> dict[str, Any]:
    sigmas, gains = numbers(stock.keypoint_loss.sigmas), stock.hyp
    return {**options_of(stock), "sigmas": sigmas, "pose_gain": gains.pose, "kobj_gain": gains.kobj}


def _inputs(preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
    *parts, shapes, rows = inputs_of(preds, batch, "boxes", "scores", "kpts")
    return *parts, shapes, rows, batch["keypoints"].to(rows.device, rows.dtype)


POSE = Adapter(
    _MEMBERS, _settings, YOLO11PoseLoss, _options, _inputs, ("box", "pose", "kobj", "cls", "dfl"),
    columns=lambda stock: ((*BY_ROW, "keypoints"), ()),
)  # fmt: skip
