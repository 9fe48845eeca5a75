"""Every operation once, forward and backward, on a small case: for tools that watch memory, such as ``compute-sanitizer``."""

import torch

import triton_yolo as ty

from .cases import STRIDES, make_case, yolo11_preds, yolox_preds


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = make_case("lognormal", batch_size=2, imgsz=96, num_classes=5)
    rows = case.rows.to(device)
    yolo11 = [x.to(device).transpose(1, 2).requires_grad_() for x in yolo11_preds(case)]
    yolox = [yolox_preds(case).to(device).requires_grad_()]
    for criterion, preds in (
        (ty.YOLO11Loss(5, strides=STRIDES), yolo11),
        (ty.YOLO11Loss(5, strides=STRIDES, topk2=1, min_box_side=16), yolo11),
        (ty.YOLOXLoss(5, strides=STRIDES, use_l1=True), yolox),
        (ty.YOLOXLoss(5, strides=STRIDES, candidates="box_and_center", iou_loss="giou"), yolox),
    ):
        out = criterion.to(device)(*preds, case.feat_shapes, rows)
        out.loss.backward()
        print(type(criterion).__name__, out.loss.item())

    points, strides = (x.to(device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    boxes = ty.decode_dfl(yolo11[0], points, reg_max=case.reg_max, strides=strides)
    ty.decode_yolox(yolox[0], points, strides).sum().backward()
    ty.bbox_iou(boxes, boxes.detach().roll(1, 1), kind="ciou").sum().backward()
    gt = ty.Targets.from_yolo(rows, case.imgsz)
    labels, gt_boxes = gt.labels.view(2, -1, 1), gt.boxes_xyxy.view(2, -1, 4)
    padded = (labels, gt_boxes, torch.ones_like(labels, dtype=torch.bool))
    scores, points_px = yolo11[1].detach(), points * strides[:, None]
    metric, _ = ty.align_metric(scores.sigmoid(), boxes.detach(), points_px, *padded, alpha=0.5, beta=6.0)
    print("top-k", ty.select_topk_candidates(metric, 10).sum().item())
    print("task-aligned", ty.TaskAlignedAssigner(10, 5)(scores.sigmoid(), boxes.detach(), points_px, *padded)[3].sum().item())
    assigned = ty.SimOTAAssigner(5)(scores, scores.amax(-1), boxes.detach(), points_px, strides, *padded)
    print("SimOTA", assigned.fg_mask.sum().item())


if __name__ == "__main__":
    main()
