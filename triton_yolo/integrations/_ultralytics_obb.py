"""The criterion of oriented boxes of Ultralytics, computed with this package's."""

from typing import Any

from .._signatures import FLOOR
from ..losses import YOLO11OBBLoss
from ._ultralytics_detect import MEMBERS, Adapter, inputs_of, options_of, settings

_MEMBERS = {
    **MEMBERS,
    "assigner": ("ultralytics.utils.tal.RotatedTaskAlignedAssigner",),
    "bbox_loss": ("ultralytics.utils.loss.RotatedBboxLoss",),
}


def _settings(criterion: Any, bce: Any, assigner: Any, bbox_loss: Any, dfl_loss: Any) -> dict[str, bool]:
    return {**settings(criterion, bce, assigner, bbox_loss, dfl_loss), "bbox_loss": bbox_loss.floor == FLOOR}


def _options(stock: Any) -> dict[str, Any]:
    return {**options_of(stock), "angle_gain": stock.hyp.angle}


ORIENTED = Adapter(
    _MEMBERS, _settings, YOLO11OBBLoss, _options, lambda preds, batch: inputs_of(preds, batch, "boxes", "angle", "scores"),
    ("box", "cls", "dfl", "angle"),
)  # fmt: skip
