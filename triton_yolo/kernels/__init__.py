"""The operations in Triton kernels: same names, inputs and outputs as in ``triton_yolo.eager``."""

from .decode import decode_dfl, decode_dfl_backward, decode_yolox, decode_yolox_backward
from .overlap import bbox_iou, bbox_iou_backward, prob_iou, prob_iou_backward
from .plans.keypoints import keypoint_loss
from .plans.masks import mask_loss
from .plans.simota import simota_assign
from .plans.task_aligned import task_aligned_assign
from .plans.yolo11 import (
    yolo11_assign,
    yolo11_criterion,
    yolo11_loss,
    yolo11_loss_backward,
    yolo11_obb_assign,
    yolo11_obb_criterion,
    yolo11_obb_loss,
    yolo11_obb_loss_backward,
)
from .plans.yolox import yolox_assign, yolox_criterion, yolox_loss, yolox_loss_backward
from .scale import scale_
from .stages import align_metric, select_topk_candidates
from .targets import unpack_rows

__all__ = [
    "align_metric",
    "bbox_iou",
    "bbox_iou_backward",
    "decode_dfl",
    "decode_dfl_backward",
    "decode_yolox",
    "decode_yolox_backward",
    "keypoint_loss",
    "mask_loss",
    "prob_iou",
    "prob_iou_backward",
    "scale_",
    "select_topk_candidates",
    "simota_assign",
    "task_aligned_assign",
    "unpack_rows",
    "yolo11_assign",
    "yolo11_criterion",
    "yolo11_loss",
    "yolo11_loss_backward",
    "yolo11_obb_assign",
    "yolo11_obb_criterion",
    "yolo11_obb_loss",
    "yolo11_obb_loss_backward",
    "yolox_assign",
    "yolox_criterion",
    "yolox_loss",
    "yolox_loss_backward",
]
