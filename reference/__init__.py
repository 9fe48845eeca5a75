"""The specification in dense, plain PyTorch: every rule as one short function, in any float type.

It is slow on purpose and imports nothing from ``triton_yolo``. Tests and benchmarks compare with it; it is not installed.
"""

from .anchors import make_anchors
from .boxes import bbox_iou, xywh_to_xyxy, xyxy_to_xywh
from .dfl import decode_dfl, dfl_loss
from .masks import MaskTargets, mask_loss
from .oriented import ORIENTED, decode_angle, decode_oriented, prob_iou
from .simota import SimOTAResult, decode_yolox, simota_assign
from .targets import pad_targets
from .task_aligned import (
    AXIS_ALIGNED,
    Geometry,
    TaskAlignedResult,
    align_metric,
    resolve_conflicts,
    select_topk_candidates,
    task_aligned_assign,
)
from .yolo11 import YOLO11LossOutput, yolo11_assign, yolo11_loss
from .yolo11_obb import YOLO11OBBLossOutput, yolo11_obb_assign, yolo11_obb_loss
from .yolo11_pose import (
    COCO_SIGMAS,
    KeypointLossOutput,
    YOLO11PoseLossOutput,
    decode_keypoints,
    keypoint_loss,
    yolo11_pose_loss,
)
from .yolo11_seg import YOLO11SegLossOutput, yolo11_seg_loss
from .yolox import YOLOXLossOutput, yolox_assign, yolox_loss

__all__ = [
    "AXIS_ALIGNED",
    "COCO_SIGMAS",
    "ORIENTED",
    "Geometry",
    "KeypointLossOutput",
    "MaskTargets",
    "SimOTAResult",
    "TaskAlignedResult",
    "YOLO11LossOutput",
    "YOLO11OBBLossOutput",
    "YOLO11PoseLossOutput",
    "YOLO11SegLossOutput",
    "YOLOXLossOutput",
    "align_metric",
    "bbox_iou",
    "decode_angle",
    "decode_dfl",
    "decode_keypoints",
    "decode_oriented",
    "decode_yolox",
    "dfl_loss",
    "keypoint_loss",
    "make_anchors",
    "mask_loss",
    "pad_targets",
    "prob_iou",
    "resolve_conflicts",
    "select_topk_candidates",
    "simota_assign",
    "task_aligned_assign",
    "xywh_to_xyxy",
    "xyxy_to_xywh",
    "yolo11_assign",
    "yolo11_loss",
    "yolo11_obb_assign",
    "yolo11_obb_loss",
    "yolo11_pose_loss",
    "yolo11_seg_loss",
    "yolox_assign",
    "yolox_loss",
]
