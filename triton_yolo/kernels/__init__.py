"""The operations in Triton kernels: same names, arguments and results as in ``triton_yolo.eager``."""

from .decode import decode_dfl, decode_dfl_backward
from .losses import yolo11_loss, yolo11_loss_backward
from .overlap import bbox_iou, bbox_iou_backward
from .targets import unpack_rows
from .task_aligned import align_metric, select_topk_candidates, task_aligned_assign, yolo11_assign

__all__ = [
    "align_metric",
    "bbox_iou",
    "bbox_iou_backward",
    "decode_dfl",
    "decode_dfl_backward",
    "select_topk_candidates",
    "task_aligned_assign",
    "unpack_rows",
    "yolo11_assign",
    "yolo11_loss",
    "yolo11_loss_backward",
]
