"""The table of operations, each run by the backend of its tensors' device.

An assignment and the loss that it leads to are operations of their own too, so that several processes can agree on the
normaliser in between, and so that the assignment can be given.
"""

from . import _checks
from . import _signatures as of
from ._operation import Operation


def _check_rows(x: of.UnpackRows) -> None:
    _checks.raw_rows("rows of targets", x.rows)


def _check_padded(x: of.AlignMetric | of.TaskAlignedAssign | of.SimOTAAssign) -> None:
    batch_size, _, num_classes = x[0].shape
    _checks.targets(x.targets, batch_size, num_classes, ("gt_labels", "gt_labels"))


def _check_yolo11(x: of.YOLO11Assign | of.YOLO11 | of.YOLO11OBBAssign | of.YOLO11OBB) -> None:
    batch_size, _, num_classes = x.pred_scores.shape
    _checks.targets(x.targets, batch_size, num_classes)


def _check_yolox(x: of.YOLOXAssign | of.YOLOX) -> None:
    batch_size, _, num_channels = x.preds.shape
    _checks.targets(x.targets, batch_size, num_channels - 5)


unpack_rows: Operation[of.GroundTruth] = Operation("unpack_rows", of.UnpackRows, check=_check_rows)

_decode_dfl_backward: Operation[of.GradDist] = Operation("decode_dfl_backward", of.DecodeDFLBackward)
_decode_yolox_backward: Operation[of.GradPreds] = Operation("decode_yolox_backward", of.DecodeYOLOXBackward)
_bbox_iou_backward: Operation[of.GradBoxes] = Operation("bbox_iou_backward", of.BboxIoUBackward)
_prob_iou_backward: Operation[of.GradBoxes] = Operation("prob_iou_backward", of.ProbIoUBackward)
decode_dfl: Operation[of.Boxes] = Operation("decode_dfl", of.DecodeDFL, gradient=_decode_dfl_backward)
decode_yolox: Operation[of.Boxes] = Operation("decode_yolox", of.DecodeYOLOX, gradient=_decode_yolox_backward)
bbox_iou: Operation[of.Overlaps] = Operation("bbox_iou", of.BboxIoU, gradient=_bbox_iou_backward)
prob_iou: Operation[of.Overlaps] = Operation("prob_iou", of.ProbIoU, gradient=_prob_iou_backward)
align_metric: Operation[of.Metrics] = Operation("align_metric", of.AlignMetric, check=_check_padded)
select_topk_candidates: Operation[of.Selected] = Operation("select_topk_candidates", of.SelectTopk)

task_aligned_assign: Operation[of.TaskAlignedAssignment] = Operation(
    "task_aligned_assign", of.TaskAlignedAssign, check=_check_padded
)
_yolo11_backward: Operation[of.GradDistScores] = Operation("yolo11_loss_backward", of.YOLO11LossBackward)
yolo11_assign: Operation[of.YOLO11Assignment] = Operation("yolo11_assign", of.YOLO11Assign, check=_check_yolo11)
yolo11_loss: Operation[of.YOLO11LossOutputs] = Operation("yolo11_loss", of.YOLO11Loss, gradient=_yolo11_backward)
yolo11_criterion: Operation[of.YOLO11Outputs] = Operation("yolo11_criterion", of.YOLO11, check=_check_yolo11)

_yolo11_obb_backward: Operation[of.GradDistAngleScores] = Operation("yolo11_obb_loss_backward", of.YOLO11OBBLossBackward)
yolo11_obb_assign: Operation[of.YOLO11Assignment] = Operation("yolo11_obb_assign", of.YOLO11OBBAssign, check=_check_yolo11)
yolo11_obb_loss: Operation[of.YOLO11OBBLossOutputs] = Operation(
    "yolo11_obb_loss", of.YOLO11OBBLoss, gradient=_yolo11_obb_backward
)
yolo11_obb_criterion: Operation[of.YOLO11OBBOutputs] = Operation("yolo11_obb_criterion", of.YOLO11OBB, check=_check_yolo11)

keypoint_loss: Operation[of.KeypointLossOutputs] = Operation("keypoint_loss", of.KeypointLoss)

simota_assign: Operation[of.SimOTAAssignment] = Operation("simota_assign", of.SimOTAAssign, check=_check_padded)
_yolox_backward: Operation[of.GradPreds] = Operation("yolox_loss_backward", of.YOLOXLossBackward)
yolox_assign: Operation[of.YOLOXAssignment] = Operation("yolox_assign", of.YOLOXAssign, check=_check_yolox)
yolox_loss: Operation[of.YOLOXLossOutputs] = Operation("yolox_loss", of.YOLOXLoss, gradient=_yolox_backward)
yolox_criterion: Operation[of.YOLOXOutputs] = Operation("yolox_criterion", of.YOLOX, check=_check_yolox)

mask_loss: Operation[of.MaskLossOutputs] = Operation("mask_loss", of.MaskLoss)
