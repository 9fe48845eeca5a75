"""The criterion of oriented boxes of Ultralytics, computed with this package's."""

from ..losses import YOLO11OBBLoss
from ._stock import BCE
from ._ultralytics_detect import Adapter

ORIENTED = Adapter(
    members={
        "bce": (BCE,),
        "assigner": ("ultralytics.utils.tal.RotatedTaskAlignedAssigner",),
        "bbox_loss": ("ultralytics.utils.loss.RotatedBboxLoss",),
        "bbox_loss.dfl_loss": ("ultralytics.utils.loss.DFLoss", "builtins.NoneType"),
    },
    inputs=("boxes", "angle", "scores"),
    make=YOLO11OBBLoss,
    more_gains=("angle",),
)
