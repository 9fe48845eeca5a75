"""What a run leaves to look at: the curves of loss and mAP, predictions beside ground truth, the assignment."""

import math
from pathlib import Path

import cv2
import numpy as np
import supervision as sv
import torch
from detector import STRIDES, Detector, feature_shapes
from evaluate import decode, predict, truth
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from samples import Sample, collate
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import triton_yolo as ty

MARKERS = {8: "o", 16: "s", 32: "D"}
METRICS = {"map50": "mAP@50", "map75": "mAP@75", "map50_95": "mAP@50-95"}
INK = "#333333"
PANEL = 4  # inches


def draw_loss(file: Path, curves: dict[str, list[float]]) -> None:
    """The loss over the steps above, its terms below; faint as measured, strong smoothed."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, values in curves.items():
        axes = above if name == "loss" else below
        (line,) = axes.plot(smooth(values), label=name)
        axes.plot(values, color=line.get_color(), alpha=0.25, linewidth=0.7)
    above.set_title("Training loss of a batch, as measured and smoothed")
    below.set_title("Its terms")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.legend(loc="upper right")
    below.set_xlabel("step")
    figure.savefig(file, dpi=120)


def draw_map(file: Path, scores: dict[float, dict[str, float]]) -> None:
    """Mean average precision on the validation images over the epochs, the best one marked."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    best = max(scores, key=lambda epoch: (scores[epoch]["map50_95"], epoch))
    for (name, label), marker in zip(METRICS.items(), MARKERS.values(), strict=True):
        values = [score[name] for score in scores.values()]
        label = f"{label}: {scores[best][name]:.3f}"
        axes.plot(list(scores), values, marker=marker, markersize=5, label=label, clip_on=False, zorder=3)  # 0 shows, too
    axes.axvline(best, color=INK, linestyle=":", label=f"best.pt: epoch {best:g}")
    axes.set_title("Mean average precision on the validation images")
    axes.set_xlabel("epoch")
    axes.set_xlim(0, 1.04 * max(1, *scores))
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def draw_predictions(
    file: Path,
    model: Detector,
    samples: list[Sample],
    classes: tuple[str, ...],
    device: torch.device,
    threshold: float = 0.3,
) -> None:
    """Ground truth beside what the model finds with a confidence above ``threshold``, coloured by class."""
    figure, grid = sheet(len(samples), side_by_side=2)
    figure.suptitle(f"Ground truth, and beside it what is found with a confidence above {threshold}", fontsize="x-large")
    found = predict(model, collate(samples).images.to(device))
    for left, right, sample, detections in zip(grid[::2], grid[1::2], samples, found, strict=True):
        expected = truth(sample)
        left.imshow(annotate(sample.image, expected, classes))
        left.set_title(f"ground truth: {count(len(expected), 'box')}")
        sure = detections[detections.confidence > threshold]
        right.imshow(annotate(sample.image, sure, classes))
        best = "" if len(sure) else f", at best with {max(detections.confidence, default=0.0):.2f}"
        right.set_title(f"found: {count(len(sure), 'box')}{best}")
    figure.savefig(file, dpi=120, bbox_inches="tight")  # titles and legend may be wider than a single image


def annotate(image: np.ndarray, detections: sv.Detections, classes: tuple[str, ...], height: float = 480) -> np.ndarray:
    """The image at about this height, with boxes and labels; no label leaves it or covers another where there is room."""
    scale = max(height, 1) / image.shape[0]
    scene = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    if len(detections) == 0:
        return scene
    scaled = sv.Detections(detections.xyxy * scale, confidence=detections.confidence, class_id=detections.class_id)
    labels = [classes[label] for label in scaled.class_id]
    if scaled.confidence is not None:
        labels = [f"{label} {p:.2f}" for label, p in zip(labels, scaled.confidence, strict=True)]
    scene = sv.BoxAnnotator(thickness=2).annotate(scene, scaled)
    return sv.LabelAnnotator(text_scale=0.45, text_padding=3, smart_position=True).annotate(scene, scaled, labels)


def draw_assignment(file: Path, model: Detector, samples: list[Sample], device: torch.device) -> None:
    """The anchors that every box got, in the colour of the box, larger for a higher score, one marker a level."""
    images = collate(samples).images.to(device)
    shapes = feature_shapes(images)
    is_positive, slot, score = (x.cpu().numpy() for x in assign(model, images, samples))
    points, strides = (x.numpy() for x in ty.make_anchors(shapes, STRIDES))
    figure, grid = sheet(len(samples))
    figure.suptitle("Which anchors learn which box: each has the colour of its box", fontsize="x-large")
    points = points * strides[:, None]
    for image, (axes, sample) in enumerate(zip(grid, samples, strict=True)):
        colours = draw_boxes(axes, sample)
        axes.set_title(f"{count(len(sample.labels), 'box')}, {count(int(is_positive[image].sum()), 'anchor')}")
        for stride, marker in MARKERS.items():
            own = is_positive[image] & (strides == stride)
            sizes = marker_size(score[image, own])
            axes.scatter(
                *points[own].T, s=sizes, c=colours[slot[image, own]], marker=marker, edgecolors="white", linewidths=0.6
            )
    legend = [
        Line2D([], [], ls="", marker=marker, markersize=11, color=INK, label=f"stride {s}") for s, marker in MARKERS.items()
    ]
    legend += [
        Line2D([], [], ls="", marker="o", markersize=marker_size(score) ** 0.5, color=INK, label=f"target score {score:g}")
        for score in (0.1, 0.5, 1.0)
    ]
    ncols = len(legend) if len(samples) > 4 else len(MARKERS)
    figure.legend(handles=legend, loc="outside lower center", ncols=ncols, fontsize="large")
    figure.savefig(file, dpi=120, bbox_inches="tight")  # titles and legend may be wider than a single image


def marker_size(score: float | np.ndarray) -> float | np.ndarray:
    """The area of a marker, in square points."""
    return 12 + 110 * score


def draw_boxes(axes: Axes, sample: Sample) -> np.ndarray:
    """The darkened image and its boxes; the colours of the boxes."""
    height, width = sample.image.shape[:2]
    axes.imshow((0.7 * sample.image).astype(np.uint8), extent=(0, width, height, 0))
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


def sheet(samples: int, side_by_side: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of square fields without axes, ``side_by_side`` for every sample."""
    columns = math.ceil(math.sqrt(samples / side_by_side))
    rows = math.ceil(samples / columns)
    figure = Figure(figsize=(PANEL * columns * side_by_side, 0.6 + (PANEL + 0.3) * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns * side_by_side, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    return figure, grid[: samples * side_by_side]


def count(number: int, noun: str) -> str:
    plural = {"box": "boxes", "anchor": "anchors"}
    return f"{number} {noun if number == 1 else plural[noun]}"
