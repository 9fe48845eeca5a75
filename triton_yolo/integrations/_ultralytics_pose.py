"""The pose criterion of Ultralytics' YOLOv8 and YOLO11, computed with this package's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..losses import YOLO11PoseLoss
from ._patching import kept
from ._stock import BCE, Stock
from ._ultralytics_detect import MEMBERS, flat, inputs_of, loss_by, options_of, settings

_MEMBERS = {**MEMBERS, "keypoint_loss": ("ultralytics.utils.loss.KeypointLoss",), "bce_pose": (BCE,)}


def pose_criterion_loss(owner: Any) -> Any:
    computation = Stock(owner, "loss", _MEMBERS, _settings)
    return loss_by(owner, computation.difference, _prepare, ("box", "pose", "kobj", "cls", "dfl"))


def _settings(criterion: Any, *members: Any) -> dict[str, bool]:
    *of_boxes, _, bce_pose = members
    is_mean = bce_pose.reduction == "mean" and bce_pose.weight is None and bce_pose.pos_weight is None
    return {**settings(criterion, *of_boxes), "bce_pose": is_mean}


def _prepare(stock: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[YOLO11PoseLoss, tuple[Any, ...]]:
    dist, scores, shapes, rows = inputs_of(preds, batch)
    keypoints = batch["keypoints"].to(dist.device, rows.dtype)
    sigmas, gains = stock.keypoint_loss.sigmas, stock.hyp
    version = None if sigmas.is_inference() else sigmas._version
    criterion = kept(
        _made, dist.device, stock.class_weights, sigmas, version, pose_gain=gains.pose, kobj_gain=gains.kobj,
        **options_of(stock),
    )  # fmt: skip
    return criterion, (dist, scores, preds["kpts"].transpose(1, 2), shapes, rows, keypoints)


def _made(class_weights: Tensor | None, sigmas: Tensor, version: int | None, **options: Any) -> YOLO11PoseLoss:
    """``version`` changes with the sigmas, which are read here alone, since that may synchronise."""
    return YOLO11PoseLoss(class_weights=flat(class_weights), sigmas=sigmas.tolist(), **options)
