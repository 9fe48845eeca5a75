"""Every operation once, forward and backward, on a small case: for tools that watch memory, such as ``compute-sanitizer``."""

from typing import Any

import torch
from torch import Tensor

import triton_yolo as ty
from bench.cases import STRIDES, Case, make_case, masks_of, yolo11_preds, yolox_preds


def main() -> None:
    for name, result in run(torch.device("cuda" if torch.cuda.is_available() else "cpu")).items():
        print(name, result.double().sum().item())


def run(device: torch.device, *, is_whole: bool = True) -> dict[str, Tensor]:
    """The result of every operation, and what of it goes back to the predictions.

    If that is not to be the whole, other tasks' losses and other forms of the criteria are left out.
    """
    case = make_case("lognormal", batch_size=2, imgsz=96, num_classes=40)  # tiles have fewer
    rows = case.rows.to(device)
    yolo11 = [x.to(device).transpose(1, 2).requires_grad_() for x in yolo11_preds(case)]
    yolox = [yolox_preds(case).to(device).requires_grad_()]
    found: dict[str, Tensor] = {}
    criteria: list[tuple[str, Any, list[Tensor]]] = [
        ("YOLO11Loss, topk2", ty.YOLO11Loss(40, strides=STRIDES, topk2=1, min_box_side=16), yolo11),
        ("YOLOXLoss, L1", ty.YOLOXLoss(40, strides=STRIDES, use_l1=True), yolox),
    ]
    if is_whole:
        criteria += [
            ("YOLO11Loss", ty.YOLO11Loss(40, strides=STRIDES), yolo11),
            ("YOLO11Loss, weights", ty.YOLO11Loss(40, strides=STRIDES, class_weights=torch.arange(40.0)), yolo11),
            ("YOLOXLoss, box, GIoU", ty.YOLOXLoss(40, strides=STRIDES, candidates="box_and_center", iou_loss="giou"), yolox),
        ]
    for name, criterion, preds in criteria:
        out = criterion.to(device)(*preds, case.feat_shapes, rows)
        found[name], found[f"{name}, positives"] = out.loss.detach(), out.num_fg
        for i, grad in enumerate(torch.autograd.grad(out.loss, preds)):
            found[f"{name}, gradient {i}"] = grad

    points, strides = (x.to(device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    boxes = ty.decode_dfl(yolo11[0], points, reg_max=case.reg_max, strides=strides)
    raw_boxes = ty.decode_yolox(yolox[0], points, strides)
    overlaps = ty.bbox_iou(boxes, boxes.detach().roll(1, 1), kind="ciou")
    oriented = torch.cat([boxes, boxes[..., :1] / 8], 2)
    of_oriented = ty.prob_iou(oriented, oriented.detach().roll(1, 1), floor=0.01)
    for name, result, preds in (
        ("decode_dfl", boxes, yolo11[:1]),
        ("decode_yolox", raw_boxes, yolox),
        ("bbox_iou", overlaps, yolo11[:1]),
        ("prob_iou", of_oriented, yolo11[:1]),
    ):
        found[name] = result.detach()
        (found[f"{name}, gradient"],) = torch.autograd.grad(result.sum(), preds, retain_graph=True)
    gt = ty.Targets.from_yolo(rows, case.imgsz)
    labels, gt_boxes = gt.labels.view(2, -1, 1), gt.boxes_xyxy.view(2, -1, 4)
    padded = (labels, gt_boxes, torch.ones_like(labels, dtype=torch.bool))
    scores, boxes, points_px = yolo11[1].detach(), boxes.detach(), points * strides[:, None]
    metric, _ = ty.align_metric(scores.sigmoid(), boxes, points_px, *padded, alpha=0.5, beta=6.0)
    found["align_metric"], found["top-k"] = metric, ty.select_topk_candidates(metric, 10)
    found["task-aligned"] = ty.TaskAlignedAssigner(10, 40)(scores.sigmoid(), boxes, points_px, *padded)[3]
    turned = torch.full_like(gt_boxes[..., :1], 0.5)
    gt_oriented = torch.cat([gt.boxes_xywh.view(2, -1, 4), turned], 2)
    pred_oriented = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2], boxes[..., :1] / 8], 2)
    rotated = ty.RotatedTaskAlignedAssigner(10, 40)
    found["rotated"] = rotated(scores.sigmoid(), pred_oriented, points_px, labels, gt_oriented, padded[2])[3]
    if is_whole:
        found |= of_oriented_boxes(case, rows, yolo11) | of_keypoints(case, rows, yolo11[0].detach()) | of_masks(case, gt)
    found["SimOTA"] = ty.SimOTAAssigner(40)(scores, scores.amax(-1), boxes, points_px, strides, *padded).fg_mask
    return found


def of_oriented_boxes(case: Case, rows: Tensor, preds: list[Tensor]) -> dict[str, Tensor]:
    turns = torch.arange(len(rows), dtype=rows.dtype, device=rows.device)[:, None]
    preds = [preds[0], (preds[0].detach()[..., :1] / 4).requires_grad_(), preds[1]]
    criterion = ty.YOLO11OBBLoss(40, strides=STRIDES).to(rows.device)
    out = criterion(*preds, case.feat_shapes, torch.cat([rows, turns], 1))
    found = {"YOLO11OBBLoss": out.loss.detach(), "YOLO11OBBLoss, positives": out.num_fg}
    grads = torch.autograd.grad(out.loss, preds)
    return found | {f"YOLO11OBBLoss, gradient {i}": grad for i, grad in enumerate(grads)}


def of_keypoints(case: Case, rows: Tensor, dist: Tensor) -> dict[str, Tensor]:
    """Keypoints of which the first is not visible."""
    raw = (dist[..., : 3 * 17] / 4).requires_grad_()
    keypoints = rows[:, None, 2:5] * torch.linspace(0, 1, 17, device=rows.device)[:, None]
    anchor = torch.arange(raw.shape[1], device=rows.device).repeat(2, 1)
    row = torch.where(anchor % 12 < 2, anchor % 7, -1)
    boxes = ty.Targets.from_yolo(rows, case.imgsz).boxes_xyxy
    out = ty.keypoint_loss(raw, row, case.imgsz * keypoints, boxes, case.feat_shapes, strides=STRIDES)
    (grad,) = torch.autograd.grad(out.loss, raw)
    return {"keypoint_loss": out.loss.detach(), "keypoint_loss, terms": torch.stack(out[1:]), "keypoint_loss, gradient": grad}


def of_masks(case: Case, gt: ty.Targets) -> dict[str, Tensor]:
    """The mask term of a few positives of either image, in both forms of masks."""
    device, masks = gt.labels.device, masks_of(case)
    preds = [x[:, :8].to(device) for x in masks[:2]]
    preds, images = [preds[0].transpose(1, 2).requires_grad_(), preds[1].requires_grad_()], masks.images.to(device)
    row = torch.full(preds[0].shape[:2], -1, device=device)
    row[0, ::40], row[1, 5::40] = torch.arange(5, device=device), torch.arange(30, 35, device=device)
    found: dict[str, Tensor] = {}
    for name, overlap_mask, given in (
        ("mask_loss", True, images),
        ("mask_loss, a mask a row", False, images[gt.image_index] % 2),
    ):
        loss = ty.mask_loss(*preds, row, gt, given, imgsz=case.imgsz, overlap_mask=overlap_mask)
        found[name] = loss.detach()
        found[f"{name}, gradient 0"], found[f"{name}, gradient 1"] = torch.autograd.grad(loss, preds)
    return found


if __name__ == "__main__":
    main()
