"""From the head's outputs to boxes and to mean average precision."""

import supervision as sv
import torch
from detector import STRIDES, Detector, feature_shapes
from samples import Sample, collate
from supervision.metrics import MeanAveragePrecision
from supervision.metrics.mean_average_precision import MeanAveragePrecisionResult
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import triton_yolo as ty


def decode(outputs: tuple[Tensor, ...], shapes: list[tuple[int, int]], reg_max: int) -> tuple[Tensor, Tensor]:
    """Boxes (B, A, 4) in pixels and class probabilities (B, A, C) of a head of either kind."""
    points, strides = ty.make_anchors(shapes, STRIDES, device=outputs[0].device)
    if len(outputs) == 2:
        dist, logits = (x.float().transpose(1, 2) for x in outputs)
        return ty.decode_dfl(dist, points, reg_max=reg_max, strides=strides), logits.sigmoid()
    preds = outputs[0].float().transpose(1, 2)
    return ty.decode_yolox(preds, points, strides), preds[..., 4:5].sigmoid() * preds[..., 5:].sigmoid()


def to_detections(boxes: Tensor, probs: Tensor, *, threshold: float, max_boxes: int = 300) -> sv.Detections:
    """The best class of every anchor of one image, without duplicates."""
    confidence, labels = probs.max(-1)
    confidence, order = confidence.sort(descending=True)
    order = order[confidence > threshold][:max_boxes]
    found = sv.Detections(
        xyxy=boxes[order].cpu().numpy(),
        confidence=confidence[: len(order)].cpu().numpy(),
        class_id=labels[order].cpu().numpy(),
    )
    return found.with_nms(0.6)


@torch.no_grad()
def predict(model: Detector, images: Tensor, *, threshold: float = 0.01) -> list[sv.Detections]:
    """Detections of every image (B, 3, H, W), uint8, with sides that the largest stride divides."""
    if any(side % max(STRIDES) for side in images.shape[2:]):
        raise ValueError(f"sides of images must be divisible by {max(STRIDES)}, got {tuple(images.shape[2:])}")
    dtype = next(model.parameters()).dtype
    boxes, probs = decode(model(images.to(dtype) / 255), feature_shapes(images), model.reg_max)
    return [to_detections(b, p, threshold=threshold) for b, p in zip(boxes, probs, strict=True)]


def truth(sample: Sample) -> sv.Detections:
    if len(sample.labels) == 0:
        return sv.Detections.empty()
    return sv.Detections(xyxy=sample.boxes_xyxy, class_id=sample.labels.astype(int))


def evaluate(model: Detector, data: Dataset[Sample], device: torch.device, batch: int = 32) -> MeanAveragePrecisionResult:
    """Mean average precision on ``data``."""
    was_training = model.training
    model.eval()
    metric = MeanAveragePrecision()
    for samples in DataLoader(data, batch_size=batch, collate_fn=list):
        images = collate(samples).images.to(device)
        metric.update(predict(model, images), [truth(sample) for sample in samples])
    model.train(was_training)
    return metric.compute()


def summary(result: MeanAveragePrecisionResult, classes: tuple[str, ...]) -> dict[str, float | dict[str, float]]:
    ap50 = zip(result.matched_classes, result.ap_per_class[:, 0], strict=True)
    return {
        "map50": round(result.map50, 4),
        "map75": round(result.map75, 4),
        "map50_95": round(result.map50_95, 4),
        "ap50_per_class": {classes[label]: round(float(ap), 4) for label, ap in ap50},
    }
