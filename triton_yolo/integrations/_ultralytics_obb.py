"""The criterion of oriented boxes of Ultralytics, computed with this package's."""

from typing import Any

from .._signatures import FLOOR
from ..losses import YOLO11OBBLoss
from ._stock import BCE
from ._ultralytics_detect import Adapter, settings

_MEMBERS = {
    "bce": (BCE,),
    "assigner": ("ultralytics.utils.tal.RotatedTaskAlignedAssigner",),
    "bbox_loss": ("ultralytics.utils.loss.RotatedBboxLoss",),
    "bbox_loss.dfl_loss": ("ultralytics.utils.loss.DFLoss", "builtins.NoneType"),  # one bin does without
}


def _settings(criterion: Any, bce: Any, assigner: Any, bbox_loss: Any, dfl_loss: Any) -> dict[str, bool]:
    return {**settings(criterion, bce, assigner, bbox_loss, dfl_loss), "bbox_loss": bbox_loss.floor == FLOOR}


ORIENTED = Adapter(_MEMBERS, _settings, ("boxes", "angle", "scores"), YOLO11OBBLoss, more_gains=("angle",))
