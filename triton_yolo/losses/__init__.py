"""Criteria for training loops: assignment and loss in one call."""

from .obb import YOLO11OBBLoss, YOLO11OBBLossOutput
from .yolo11 import YOLO11Loss, YOLO11LossOutput
from .yolox import YOLOXLoss, YOLOXLossOutput

__all__ = ["YOLO11Loss", "YOLO11LossOutput", "YOLO11OBBLoss", "YOLO11OBBLossOutput", "YOLOXLoss", "YOLOXLossOutput"]
