"""Label assignment and losses of one-stage detectors, fused: YOLO11's task-aligned family and YOLOX's SimOTA.

Criteria, from the raw output of a head and the ground truth to the loss with its gradient:

- ``YOLO11Loss``: YOLO11, YOLOv8, v9, v10, 12 and 26; returns ``YOLO11LossOutput``.
- ``YOLO11OBBLoss``: oriented boxes of YOLO11, YOLOv8 and 26; returns ``YOLO11OBBLossOutput``.
- ``YOLO11SegmentationLoss``: YOLO11-seg and YOLOv8-seg; returns ``YOLO11SegmentationLossOutput``. Alone: ``mask_loss``.
- ``YOLOXLoss``: YOLOX; returns ``YOLOXLossOutput``.
- ``YOLO11PoseLoss``: YOLO11 and YOLOv8 with keypoints; returns ``YOLO11PoseLossOutput``.
- ``Targets``: ground truth in other forms than YOLO's rows.
- ``keypoint_loss``: keypoints alone, for an assignment from elsewhere; returns ``KeypointLossOutput``.

Assigners of padded ground truth:

- ``TaskAlignedAssigner``: returns ``TaskAlignedResult``, as does ``RotatedTaskAlignedAssigner``, of oriented boxes.
- ``SimOTAAssigner``: returns ``SimOTAResult``.

Their stages:

- ``make_anchors``: anchor points of a feature pyramid.
- ``decode_dfl``, ``decode_yolox``: boxes of raw predictions.
- ``align_metric``, ``select_topk_candidates``: the candidates of task-aligned assignment.
- ``bbox_iou``: IoU, GIoU, DIoU and CIoU with their gradients; ``prob_iou``: that of oriented boxes.

``backend`` chooses between Triton kernels and sparse PyTorch; ``__version__`` is that of this package. Trainers that people use
take one line of ``triton_yolo.integrations.ultralytics``, ``.yolox`` or ``.libreyolo``. ``triton_yolo.graphs`` makes training
steps CUDA graphs. Examples take for granted:

    >>> import torch
    >>> import triton_yolo as ty
"""

from ._backend import backend
from ._version import __version__
from .anchors import make_anchors
from .assigners import RotatedTaskAlignedAssigner, SimOTAAssigner, SimOTAResult, TaskAlignedAssigner, TaskAlignedResult
from .keypoints import KeypointLossOutput, keypoint_loss
from .losses import (
    YOLO11Loss,
    YOLO11LossOutput,
    YOLO11OBBLoss,
    YOLO11OBBLossOutput,
    YOLO11PoseLoss,
    YOLO11PoseLossOutput,
    YOLO11SegmentationLoss,
    YOLO11SegmentationLossOutput,
    YOLOXLoss,
    YOLOXLossOutput,
)
from .masks import mask_loss
from .stages import align_metric, bbox_iou, decode_dfl, decode_yolox, prob_iou, select_topk_candidates
from .targets import Targets

__all__ = [
    "KeypointLossOutput",
    "RotatedTaskAlignedAssigner",
    "SimOTAAssigner",
    "SimOTAResult",
    "Targets",
    "TaskAlignedAssigner",
    "TaskAlignedResult",
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
    "__version__",
    "align_metric",
    "backend",
    "bbox_iou",
    "decode_dfl",
    "decode_yolox",
    "keypoint_loss",
    "make_anchors",
    "mask_loss",
    "prob_iou",
    "select_topk_candidates",
]
