"""The operations in Triton kernels: same names, inputs and outputs as in ``triton_yolo.eager``."""

from .decode import decode_dfl, decode_dfl_backward, decode_yolox, decode_yolox_backward
from .overlap import bbox_iou, bbox_iou_backward
from .scale import scale_
from .simota import simota_assign
from .stages import align_metric, select_topk_candidates
from .targets import unpack_rows
from .task_aligned import task_aligned_assign
from .yolo11 import yolo11_assign, yolo11_criterion, yolo11_loss, yolo11_loss_backward
from .yolox import yolox_assign, yolox_criterion, yolox_loss, yolox_loss_backward
