"""Criteria for training loops: assignment and loss in one call."""

from .obb import YOLO11OBBLoss, YOLO11OBBLossOutput
from .pose import YOLO11PoseLoss, YOLO11PoseLossOutput
from .segmentation import YOLO11SegmentationLoss, YOLO11SegmentationLossOutput
from .yolo11 import YOLO11Loss, YOLO11LossOutput
from .yolox import YOLOXLoss, YOLOXLossOutput

__all__ = [
    "YOLO11Loss",
    "YOLO11LossOutput",
    "YOLO11OBBLoss",
    "YOLO11OBBLossOutput",
    "YOLO11PoseLoss",
    "YOLO11PoseLossOutput",
    "YOLO11SegmentationLoss",
    "YOLO11SegmentationLossOutput",
    "YOLOXLoss",
    "YOLOXLossOutput",
]
