"""The operations in Triton kernels: same names, arguments and results as in ``triton_yolo.eager``."""

from .decode import decode_dfl, decode_dfl_backward, decode_yolox, decode_yolox_backward
from .overlap import bbox_iou, bbox_iou_backward
from .simota import simota_assign, yolox_assign
from .stages import align_metric, select_topk_candidates
from .targets import unpack_rows
from .task_aligned import task_aligned_assign, yolo11_assign
from .yolo11 import yolo11_loss, yolo11_loss_backward
from .yolox import yolox_loss, yolox_loss_backward

__all__ = [
    "align_metric",
    "bbox_iou",
    "bbox_iou_backward",
    "decode_dfl",
    "decode_dfl_backward",
    "decode_yolox",
    "decode_yolox_backward",
    "select_topk_candidates",
    "simota_assign",
    "task_aligned_assign",
    "unpack_rows",
    "yolo11_assign",
    "yolo11_loss",
    "yolo11_loss_backward",
    "yolox_assign",
    "yolox_loss",
    "yolox_loss_backward",
]
