"""Criteria for training loops: assignment and loss in one call."""

from .yolo11 import YOLO11Loss, YOLO11LossOutput
from .yolox import YOLOXLoss, YOLOXLossOutput

__all__ = ["YOLO11Loss", "YOLO11LossOutput", "YOLOXLoss", "YOLOXLossOutput"]
