"""The operations in sparse PyTorch, for any device: work and memory grow with the pairs of ground truth and candidate."""

from .boxes import bbox_iou, bbox_iou_backward
from .decode import decode_dfl, decode_dfl_backward, decode_yolox, decode_yolox_backward
from .keypoints import keypoint_loss
from .masks import mask_loss
from .oriented import prob_iou, prob_iou_backward
from .scale import scale_
from .simota import simota_assign
from .targets import unpack_rows
from .task_aligned import align_metric, select_topk_candidates, task_aligned_assign
from .yolo11 import yolo11_assign, yolo11_criterion, yolo11_loss, yolo11_loss_backward
from .yolo11_obb import yolo11_obb_assign, yolo11_obb_criterion, yolo11_obb_loss, yolo11_obb_loss_backward
from .yolox import yolox_assign, yolox_criterion, yolox_loss, yolox_loss_backward

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
