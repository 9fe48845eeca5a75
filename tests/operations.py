"""Small inputs of every operation, from which all tests of how PyTorch sees the operations take theirs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.gradients import gradient_of
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _ops
from triton_yolo import _signatures as of
from triton_yolo._operation import Operation
from triton_yolo._precision import working_dtype

OPERATIONS: dict[str, Operation] = {value.name: value for value in vars(_ops).values() if isinstance(value, Operation)}
LEVELS = of.Levels((4, 4, 2, 2), (8.0, 16.0))
GAINS = (7.5, 0.5, 1.5)


def tensors_of(x: Any) -> list[Tensor]:
    """All tensors of inputs or outputs, in order."""
    parts = [part for value in x for part in (value if isinstance(value, list) else [value])]
    return [part for part in parts if isinstance(part, Tensor)]


def with_tensors(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The inputs with ``function`` applied to every tensor."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(part) for part in value]
        return function(value) if isinstance(value, Tensor) else value

    return type(x)(*map(changed, x))


def _anchors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ty.make_anchors([(4, 4), (2, 2)], (8, 16), device=DEVICE, dtype=dtype)


def decode_dfl(dtype: torch.dtype, reg_max: int = 5, *, has_strides: bool = True) -> of.DecodeDFL:
    points, strides = _anchors(dtype)
    torch.manual_seed(0)
    dist = torch.randn(2, 20, 4 * reg_max, dtype=dtype, device=DEVICE)
    return of.DecodeDFL(dist, points, strides if has_strides else None, reg_max)


def decode_yolox(dtype: torch.dtype) -> of.DecodeYOLOX:
    return of.DecodeYOLOX(*decode_dfl(dtype)[:3])


def bbox_iou(dtype: torch.dtype, kind: str = "ciou") -> of.BboxIoU:
    torch.manual_seed(0)
    low = torch.rand(2, 12, 2, dtype=dtype, device=DEVICE)
    a, b = torch.cat([low, low + 0.3 + torch.rand(2, 12, 2, dtype=dtype, device=DEVICE)], -1)
    return of.BboxIoU(a, b, kind, 1e-7)


def prob_iou(dtype: torch.dtype, floor: float = 0.01) -> of.ProbIoU:
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 12, 5, dtype=dtype, device=DEVICE) + torch.tensor([0, 0, 0.3, 0.3, 0], dtype=dtype, device=DEVICE)
    return of.ProbIoU(a, b, 1e-7, floor)


def _padded(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Scores, boxes, points, strides and ground truth: two rows in image 0, one in image 1 and padding."""
    points, strides = _anchors(dtype)
    points = points * strides[:, None]
    boxes = torch.cat([points - 6, points + 7], -1).repeat(2, 1, 1)
    gt = [[[2.0, 2, 20, 20], [8, 8, 30, 24]], [[0.0, 0, 9, 9], [0, 0, 0, 0]]]
    labels, gt = torch.tensor([[0, 2], [1, 0]], device=DEVICE), torch.tensor(gt, dtype=dtype, device=DEVICE)
    torch.manual_seed(0)
    scores = torch.rand(2, 20, 3, dtype=dtype, device=DEVICE)
    return scores, boxes, points, strides, list(ty.Targets.from_padded(labels, gt))


def align_metric(dtype: torch.dtype) -> of.AlignMetric:
    scores, boxes, points, _, targets = _padded(dtype)
    return of.AlignMetric(scores, boxes, points, targets, 2, 1.0, 6.0, 0.0)


def select_topk_candidates(dtype: torch.dtype) -> of.SelectTopk:
    torch.manual_seed(0)
    return of.SelectTopk(torch.rand(2, 3, 9, dtype=dtype, device=DEVICE), 4, None)


def task_aligned_assign(dtype: torch.dtype) -> of.TaskAlignedAssign:
    scores, boxes, points, _, targets = _padded(dtype)
    return of.TaskAlignedAssign(scores, boxes, points, targets, of.TaskAligned(10, None, 1.0, 6.0, 0.0, 1e-9))


def rotated_task_aligned_assign(dtype: torch.dtype) -> of.TaskAlignedAssign:
    """The same operation of oriented boxes."""
    x = task_aligned_assign(dtype)
    angle = x.points[:, :1].expand(2, -1, -1) / 8
    boxes = torch.cat([(x.boxes[..., :2] + x.boxes[..., 2:]) / 2, x.boxes[..., 2:] - x.boxes[..., :2], angle], 2)
    oriented = torch.cat([x.targets[3], torch.arange(4, device=DEVICE)[:, None].to(x.targets[3])], 1)
    return x._replace(boxes=boxes, targets=[*x.targets[:3], oriented])


def simota_assign(dtype: torch.dtype) -> of.SimOTAAssign:
    scores, boxes, points, strides, targets = _padded(dtype)
    return of.SimOTAAssign(scores, scores[..., 0], boxes, points, strides, targets, of.SimOTA("center", 1.5))


def rows(dtype: torch.dtype) -> Tensor:
    return small_yolo11()[-1].to(dtype)


def unpack_rows(dtype: torch.dtype) -> of.UnpackRows:
    return of.UnpackRows(rows(dtype), of.ImageSize((32, 64)))


def packed(dtype: torch.dtype) -> list[Tensor]:
    """The rows as four tensors."""
    return list(ty.Targets.from_yolo(rows(dtype), (32, 32)))


def yolo11_assign(dtype: torch.dtype, reg_max: int = 8, topk2: int | None = 2) -> of.YOLO11Assign:
    torch.manual_seed(0)
    dist = torch.rand(2, 20, 4 * reg_max, dtype=dtype, device=DEVICE)
    scores = torch.randn(2, 20, 3, dtype=dtype, device=DEVICE)
    rule = of.TaskAligned(10, topk2, 0.5, 6.0, 0.0, 1e-9)
    return of.YOLO11Assign(dist, scores, packed(dtype), LEVELS, reg_max, rule)


def yolo11_loss(dtype: torch.dtype, reg_max: int = 8, weights: Tensor | None = None) -> of.YOLO11Loss:
    x = yolo11_assign(dtype, reg_max, topk2=None)
    row, score, sums, num_fg, labels, boxes = _ops.yolo11_assign(x)
    assert num_fg > 0
    return of.YOLO11Loss(
        x.pred_dist, x.pred_scores, row, score, sums.clamp(min=1), labels, boxes, weights, LEVELS, reg_max, GAINS
    )  # fmt: skip


def yolo11_criterion(dtype: torch.dtype, *, wants_grad: bool = True, wants_row: bool = False) -> of.YOLO11:
    x, weights = yolo11_assign(dtype), torch.tensor([1.0, 2.0, 0.5], device=DEVICE)
    return of.YOLO11(
        x.pred_dist, x.pred_scores, [rows(dtype)], weights, LEVELS, x.reg_max, x.assigner, GAINS, wants_grad, wants_row
    )  # fmt: skip


def oriented_rows(dtype: torch.dtype) -> Tensor:
    upright = rows(dtype)
    return torch.cat([upright, torch.arange(len(upright), device=DEVICE)[:, None].to(upright)], 1)


def yolo11_obb_assign(dtype: torch.dtype, reg_max: int = 8, topk2: int | None = 2) -> of.YOLO11OBBAssign:
    x = yolo11_assign(dtype, reg_max, topk2)
    angle = torch.randn(2, 20, 1, dtype=dtype, device=DEVICE)
    targets = list(ty.Targets.from_yolo(oriented_rows(dtype), (32, 32)))
    return of.YOLO11OBBAssign(x.pred_dist, angle, x.pred_scores, targets, LEVELS, reg_max, x.assigner)


def yolo11_obb_loss(dtype: torch.dtype, reg_max: int = 8, weights: Tensor | None = None) -> of.YOLO11OBBLoss:
    x = yolo11_obb_assign(dtype, reg_max, topk2=None)
    row, score, sums, num_fg, labels, boxes = _ops.yolo11_obb_assign(x)
    assert num_fg > 0
    preds, gains = (x.pred_dist, x.pred_angle, x.pred_scores), (*GAINS, 1.0)
    return of.YOLO11OBBLoss(*preds, row, score, sums.clamp(min=1), labels, boxes, weights, LEVELS, reg_max, gains)


def yolo11_obb_criterion(dtype: torch.dtype, *, wants_grad: bool = True) -> of.YOLO11OBB:
    x, weights = yolo11_obb_assign(dtype), torch.tensor([1.0, 2.0, 0.5], device=DEVICE)
    preds, gains = (x.pred_dist, x.pred_angle, x.pred_scores), (*GAINS, 1.0)
    return of.YOLO11OBB(*preds, [oriented_rows(dtype)], weights, LEVELS, x.reg_max, x.assigner, gains, wants_grad)


def yolox_assign(dtype: torch.dtype) -> of.YOLOXAssign:
    preds = small_yolox()[1].to(dtype)
    return of.YOLOXAssign(preds, packed(dtype), LEVELS, of.SimOTA("center", 1.5))


def yolox_loss(dtype: torch.dtype, iou_loss: str = "iou", *, use_l1: bool = True) -> of.YOLOXLoss:
    x = yolox_assign(dtype)
    row, iou, counts, labels, boxes = _ops.yolox_assign(x)
    assert counts[0] > 0
    gain = torch.tensor(float(use_l1), device=DEVICE)
    return of.YOLOXLoss(x.preds, row, iou, counts[0].to(iou.dtype), labels, boxes, gain, LEVELS, iou_loss, 5.0)


def yolox_criterion(dtype: torch.dtype, *, wants_grad: bool = True) -> of.YOLOX:
    x, gain = yolox_assign(dtype), torch.ones((), device=DEVICE)
    return of.YOLOX(x.preds, [rows(dtype)], gain, LEVELS, x.assigner, "giou", 5.0, wants_grad)


def keypoint_loss(dtype: torch.dtype, num_dims: int = 3, *, wants_grad: bool = True) -> of.KeypointLoss:
    """Five keypoints of two rows, some unseen, for seven positives."""
    torch.manual_seed(0)
    preds = torch.randn(2, 20, 5 * num_dims, dtype=dtype, device=DEVICE)
    row = torch.full((2, 20), -1, dtype=torch.int32, device=DEVICE)
    row[0, [3, 6, 17]], row[1, [0, 1, 9, 19]] = 1, 0
    keypoints = torch.rand(2, 5, 3, dtype=dtype, device=DEVICE)
    keypoints[..., 2] = torch.tensor([2, 0, 1, 2, 2], device=DEVICE)
    sizes = torch.tensor([[0.75, 0.5], [0.9, 0.7]], dtype=dtype, device=DEVICE)
    other, number = torch.ones((), dtype=working_dtype(dtype), device=DEVICE), (row >= 0).sum()
    sigmas = (0.05, 0.1, 0.2, 0.1, 0.3)
    return of.KeypointLoss(preds, other, row, number, None, keypoints, sizes, True, LEVELS, sigmas, (12.0, 1.0), wants_grad)


def mask_loss(dtype: torch.dtype, *, overlap_mask: bool = True, wants_grad: bool = True) -> of.MaskLoss:
    generator = torch.Generator().manual_seed(0)
    preds = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 20, 5), (2, 5, 8, 6)))
    boxes = torch.tensor([[2.0, 2, 20, 20], [8, 8, 30, 24], [0, 0, 9, 9]], dtype=working_dtype(dtype))
    row = torch.full((2, 20), -1, dtype=torch.int32)
    row[0, ::4], row[0, 1], row[1, 3::5] = 0, 1, 2
    masks = torch.randint(3 if overlap_mask else 2, (2 if overlap_mask else 3, 8, 6), generator=generator, dtype=torch.uint8)
    gt = (row, boxes, masks, torch.tensor([1, 2, 1]), torch.tensor(1 / 10, dtype=working_dtype(dtype)))
    return of.MaskLoss(*(x.to(DEVICE) for x in (*preds, *gt)), of.ImageSize((32, 24)), overlap_mask, wants_grad)


def _backward(make: Callable[[torch.dtype], Any]) -> Callable[[torch.dtype], Any]:
    def inputs(dtype: torch.dtype) -> Any:
        x = make(dtype)
        return gradient_of(x, OPERATIONS[make.__name__](x))

    return inputs


DIFFERENTIABLE = (decode_dfl, decode_yolox, bbox_iou, prob_iou, yolo11_loss, yolo11_obb_loss, yolox_loss)
_PLAIN = (
    unpack_rows, align_metric, select_topk_candidates, task_aligned_assign, simota_assign, yolo11_assign, yolo11_criterion,
    yolo11_obb_assign, yolo11_obb_criterion, yolox_assign, yolox_criterion, keypoint_loss, mask_loss,
)  # fmt: skip
INPUTS: dict[str, Callable[[torch.dtype], Any]] = {make.__name__: make for make in (*DIFFERENTIABLE, *_PLAIN)}
INPUTS |= {f"{make.__name__}_backward": _backward(make) for make in DIFFERENTIABLE}
"""By the name of the operation: its inputs in a type."""


def same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same types, sizes and bits."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
