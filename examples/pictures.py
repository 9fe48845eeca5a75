"""What a run leaves to look at: the loss curve, predictions, the assignment."""

import math
from pathlib import Path

import cv2
import numpy as np
import supervision as sv
import torch
from detector import STRIDES, Detector, feature_shapes
from evaluate import decode, predict
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from samples import Sample, collate
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import triton_yolo as ty

MARKERS = {8: "o", 16: "s", 32: "D"}


def draw_loss(file: Path, curves: dict[str, list[float]]) -> None:
    """The loss over the steps above, its terms below; faint as measured, strong smoothed."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, values in curves.items():
        axes = above if name == "loss" else below
        (line,) = axes.plot(smooth(values), label=name)
        axes.plot(values, color=line.get_color(), alpha=0.25, linewidth=0.7)
    for axes in (above, below):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    below.set_xlabel("step")
    figure.savefig(file, dpi=120)


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def draw_predictions(
    file: Path, model: Detector, samples: list[Sample], classes: tuple[str, ...], device: torch.device
) -> None:
    """What the model finds with a confidence above 0.3, coloured by class."""
    figure, grid = sheet(len(samples))
    found = predict(model, collate(samples).images.to(device), threshold=0.3)
    for axes, sample, detections in zip(grid, samples, found, strict=True):
        scale = max(1, round(640 / sample.image.shape[0]))
        scene = cv2.resize(sample.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        detections.xyxy = detections.xyxy * scale
        labels = [f"{classes[label]} {p:.2f}" for label, p in zip(detections.class_id, detections.confidence, strict=True)]
        scene = sv.BoxAnnotator(thickness=3).annotate(scene, detections)
        scene = sv.LabelAnnotator(text_scale=0.6, text_padding=3).annotate(scene, detections, labels)
        axes.imshow(scene)
    figure.savefig(file, dpi=120)


def draw_assignment(file: Path, model: Detector, samples: list[Sample], device: torch.device) -> None:
    """The anchors that every box got, in the colour of the box, larger for a higher score, one marker a level."""
    images = collate(samples).images.to(device)
    shapes = feature_shapes(images)
    is_positive, slot, score = (x.cpu().numpy() for x in assign(model, images, samples))
    points, strides = (x.numpy() for x in ty.make_anchors(shapes, STRIDES))
    figure, grid = sheet(len(samples))
    points = points * strides[:, None]
    for image, (axes, sample) in enumerate(zip(grid, samples, strict=True)):
        colours = draw_boxes(axes, sample)
        for stride, marker in MARKERS.items():
            own = is_positive[image] & (strides == stride)
            sizes = 4 + 60 * score[image, own]
            axes.scatter(
                *points[own].T, s=sizes, c=colours[slot[image, own]], marker=marker, edgecolors="white", linewidths=0.5
            )
    legend = [Line2D([], [], ls="", marker=marker, color="grey", label=f"stride {s}") for s, marker in MARKERS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    figure.savefig(file, dpi=120)


def draw_boxes(axes: Axes, sample: Sample) -> np.ndarray:
    """The darkened image and its boxes; the colours of the boxes."""
    height, width = sample.image.shape[:2]
    axes.imshow(sample.image // 2, extent=(0, width, height, 0))
    colours = colormaps["hsv"](np.linspace(0, 1, len(sample.labels), endpoint=False))
    for (x1, y1, x2, y2), colour in zip(sample.boxes_xyxy, colours, strict=True):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.2))
    return colours


@torch.no_grad()
def assign(model: Detector, images: Tensor, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Whether an anchor is positive, the slot of its box, its target score (YOLOX: the IoU that scales its class), (B, A)."""
    outputs, shapes = model(images / 255), feature_shapes(images)
    boxes, probs = decode(outputs, shapes, model.reg_max)
    points, strides = ty.make_anchors(shapes, STRIDES, device=images.device)
    points_px = points * strides[:, None]
    labels = pad_sequence([torch.from_numpy(s.labels).long() for s in samples], True, -1).to(images.device)
    gt_boxes = pad_sequence([torch.from_numpy(s.boxes_xyxy) for s in samples], True).to(images.device)
    gt = (labels.clamp(min=0), gt_boxes, labels >= 0)
    if len(outputs) == 2:
        aligned = ty.TaskAlignedAssigner(10, model.num_classes, alpha=0.5, beta=6.0)(probs, boxes, points_px, *gt)
        return aligned.fg_mask, aligned.target_gt_idx, aligned.target_scores.amax(-1)
    logits = outputs[0].float().transpose(1, 2)
    matched = ty.SimOTAAssigner(model.num_classes)(logits[..., 5:], logits[..., 4], boxes, points_px, strides, *gt)
    return matched.fg_mask, matched.target_gt_idx, matched.matched_iou


def sheet(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` square fields without axes."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    return figure, grid[:count]
