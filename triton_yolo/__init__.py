"""Label assignment and losses of one-stage detectors, fused: YOLO11's task-aligned family and YOLOX's SimOTA."""

from ._backend import backend
from ._version import __version__
from .anchors import make_anchors
from .assigners import SimOTAAssigner, SimOTAResult, TaskAlignedAssigner, TaskAlignedResult
from .losses import YOLO11Loss, YOLO11LossOutput, YOLOXLoss, YOLOXLossOutput
from .stages import align_metric, bbox_iou, decode_dfl, decode_yolox, select_topk_candidates
from .targets import Targets

__all__ = [
    "SimOTAAssigner",
    "SimOTAResult",
    "Targets",
    "TaskAlignedAssigner",
    "TaskAlignedResult",
    "YOLO11Loss",
    "YOLO11LossOutput",
    "YOLOXLoss",
    "YOLOXLossOutput",
    "__version__",
    "align_metric",
    "backend",
    "bbox_iou",
    "decode_dfl",
    "decode_yolox",
    "make_anchors",
    "select_topk_candidates",
]
