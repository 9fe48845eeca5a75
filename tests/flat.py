"""Operations by position, as short tests write them: ``eager``, ``kernels`` and ``ops`` build inputs and call the operation.

Ground truth is (image_index, labels, corners), and centres and sizes where SimOTA wants them; results are what tests look at.
"""

from typing import Any

import torch
from torch import Tensor

from triton_yolo import _ops
from triton_yolo import _signatures as of


def _targets(image_index: Tensor, labels: Tensor, corners: Tensor, xywh: Tensor | None = None) -> list[Tensor]:
    if xywh is None:
        xywh = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
    return [image_index, labels, corners, xywh]


def unpack_rows(rows, width, height):
    return of.UnpackRows(rows, width, height)


def decode_dfl(dist, points, strides, reg_max):
    return of.DecodeDFL(dist, points, strides, reg_max)


def decode_dfl_backward(grad, dist, strides, reg_max):
    return of.DecodeDFLBackward(grad, dist, strides, reg_max, "")


def decode_yolox(preds, points, strides):
    return of.DecodeYOLOX(preds, points, strides)


def decode_yolox_backward(grad, preds, strides):
    return of.DecodeYOLOXBackward(grad, preds, strides, "")


def bbox_iou(a, b, kind, eps):
    return of.BboxIoU(a, b, kind, eps)


def bbox_iou_backward(grad, a, b, kind, eps):
    return of.BboxIoUBackward(grad, a, b, kind, eps, "")


def align_metric(scores, boxes, points, labels, gt_boxes, mask, alpha, beta, min_box_side):
    batch_size, num_slots = labels.shape
    image_index = torch.arange(batch_size, device=labels.device)[:, None].where(mask, -1).reshape(-1)
    targets = _targets(image_index, labels.reshape(-1), gt_boxes.reshape(-1, 4))
    return of.AlignMetric(scores, boxes, points, targets, num_slots, alpha, beta, min_box_side)


def select_topk_candidates(metric, topk, mask_gt):
    return of.SelectTopk(metric, topk, mask_gt)


def task_aligned_assign(scores, boxes, points, image_index, labels, gt_boxes, *rule):
    return of.TaskAlignedAssign(scores, boxes, points, _targets(image_index, labels, gt_boxes), of.TaskAligned(*rule))


def yolo11_assign(dist, scores, image_index, labels, gt_boxes, shapes, strides, reg_max, *rule):
    levels = of.Levels(tuple(shapes), tuple(strides))
    targets = _targets(image_index, labels, gt_boxes)
    return of.YOLO11Assign(dist, scores, targets, levels, reg_max, of.TaskAligned(*rule, 1e-9))


def _given(dist, scores, row, score, normaliser, labels, gt_boxes, weights, shapes, strides, reg_max, gains):
    levels = of.Levels(tuple(shapes), tuple(strides))
    return dist, scores, row, score, normaliser, labels, gt_boxes, weights, levels, reg_max, tuple(gains)


def yolo11_loss(*args):
    return of.YOLO11Loss(*_given(*args))


def yolo11_loss_backward(grad, *args):
    return of.YOLO11LossBackward(grad, *_given(*args), "")


def simota_assign(cls_logits, obj_logits, boxes, points, strides, image_index, labels, gt_boxes, gt_xywh, *rule):
    targets = _targets(image_index, labels, gt_boxes, gt_xywh)
    return of.SimOTAAssign(cls_logits, obj_logits, boxes, points, strides, targets, of.SimOTA(*rule))


def yolox_assign(preds, image_index, labels, gt_boxes, gt_xywh, shapes, strides, *rule):
    levels = of.Levels(tuple(shapes), tuple(strides))
    return of.YOLOXAssign(preds, _targets(image_index, labels, gt_boxes, gt_xywh), levels, of.SimOTA(*rule))


def _x_given(preds, row, iou, normaliser, labels, gt_xywh, shapes, strides, iou_loss, iou_gain, l1_gain):
    levels = of.Levels(tuple(shapes), tuple(strides))
    return preds, row, iou, normaliser, labels, gt_xywh, l1_gain, levels, iou_loss, iou_gain


def yolox_loss(*args):
    return of.YOLOXLoss(*_x_given(*args))


def yolox_loss_backward(grad, *args):
    return of.YOLOXLossBackward(grad, *_x_given(*args), "")


_RESULTS = {"yolo11_assign": 4, "yolox_assign": 3}  # not the ground truth that they hand on


class Flat:
    """The operations of a module, by position."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        make, operation = globals()[name], getattr(self._module, name)

        def call(*args: Any) -> Any:
            result = tuple(operation(make(*args)))[: _RESULTS.get(name)]
            return result[0] if len(result) == 1 else result

        return call


class _Eager:
    def __getattr__(self, name: str) -> Any:
        from triton_yolo import eager

        return getattr(eager, name)


class _Kernels:
    def __getattr__(self, name: str) -> Any:
        from triton_yolo import kernels

        return getattr(kernels, name)


eager, kernels, ops = Flat(_Eager()), Flat(_Kernels()), Flat(_ops)
