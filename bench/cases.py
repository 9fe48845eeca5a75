"""Inputs: ground truth with real or realistic box sizes, and predictions of a network that has learnt something."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reference.oriented import sides_from
from triton_yolo import make_anchors

STRIDES = (8, 16, 32)
CROWD, HUNDRED = 5000, 100  # boxes an image
_MOSAIC = 4  # images whose boxes make one image
_CANVAS = 640  # side in pixels of the image that box sizes refer to
_CHANNELS, _PIXEL = 32, 4  # prototypes, and px a pixel of them
_KEYPOINTS = 17


class Case(NamedTuple):
    """A batch of ground truth: YOLO rows (N, 6) and the sizes of everything."""

    rows: Tensor
    batch_size: int
    imgsz: int
    num_classes: int
    reg_max: int = 16

    @property
    def feat_shapes(self) -> list[tuple[int, int]]:
        return [(self.imgsz // stride, self.imgsz // stride) for stride in STRIDES]

    @property
    def num_anchors(self) -> int:
        """Of the whole batch."""
        return self.batch_size * sum(height * width for height, width in self.feat_shapes)


def make_case(
    boxes: str, *, batch_size: int, imgsz: int, num_classes: int, reg_max: int = 16, data: Path | None = None
) -> Case:
    """Build the case of ``boxes``: "coco" (needs ``data``), "lognormal" (its sizes without the data), or many of these in an
    image, "hundred" or "crowded".
    """
    if boxes == "coco":
        images = _coco_images(data, num_classes)
    else:
        number = {"crowded": CROWD, "hundred": HUNDRED}.get(boxes, 30)
        images = [_lognormal_image(number, num_classes, seed) for seed in range(batch_size)]
    per_image = [images[i % len(images)] for i in range(batch_size)]
    rows = torch.cat([torch.nn.functional.pad(image, (1, 0), value=i) for i, image in enumerate(per_image)])
    return Case(rows, batch_size, imgsz, num_classes, reg_max)


def has_coco(data: Path | None) -> bool:
    return data is not None and (data / "coco_boxes.json").is_file()


@lru_cache(maxsize=2)
def yolo11_preds(case: Case) -> tuple[Tensor, Tensor]:
    """Logits of distances (B, 4R, A), a peak at the distance, and of classes (B, C, A)."""
    generator = torch.Generator().manual_seed(1)
    distances, logits = _learnt(case, generator)
    return distance_logits(distances, case.reg_max, generator), logits


def distance_logits(distances: Tensor, reg_max: int, generator: torch.Generator) -> Tensor:
    """Logits (B, 4R, A) with a peak at distances (B, 4, A)."""
    if reg_max == 1:
        return distances
    bins = torch.arange(reg_max)[:, None]
    peak = -1.5 * (bins - distances.clamp(max=reg_max - 1)[:, :, None]).abs()
    return (peak + 0.3 * torch.randn(peak.shape, generator=generator)).flatten(1, -2)


@lru_cache(maxsize=2)
def yolox_preds(case: Case) -> Tensor:
    """Raw (B, A, 5 + C)."""
    generator = torch.Generator().manual_seed(1)
    distances, logits = _learnt(case, generator)
    low, high = distances.transpose(1, 2).split(2, -1)
    offset, size = 0.5 + (high - low) / 2, (high + low).clamp(min=0.05)
    objectness = torch.randn(*offset.shape[:2], 1, generator=generator) - 4
    return torch.cat([offset, size.log(), objectness, logits.transpose(1, 2)], -1)


def _learnt(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distances (B, 4, A) in cells, within some 15 % of the box around an anchor, and class logits (B, C, A) that know it."""
    points, strides = make_anchors(case.feat_shapes, STRIDES)
    points, num_anchors = points * strides[:, None], len(points)
    distances = torch.empty(case.batch_size, 4, num_anchors).log_normal_(0.5, 0.7, generator=generator)
    logits = torch.randn(case.batch_size, case.num_classes, num_anchors, generator=generator) * 1.5 - 5
    noise = torch.empty_like(distances).log_normal_(0, 0.15, generator=generator)
    for image in range(case.batch_size):
        rows = case.rows[case.rows[:, 0] == image]
        if len(rows) == 0:
            continue
        centre, size = rows[:, 2:4] * case.imgsz, rows[:, 4:] * case.imgsz
        eccentricity = ((points[:, None] - centre) / size).abs().amax(-1)
        nearest = eccentricity.min(1)
        inside = (nearest.values < 0.5).nonzero().squeeze(1)
        box, at = nearest.indices[inside], points[inside]
        sides = torch.cat([at - centre[box] + size[box] / 2, centre[box] + size[box] / 2 - at], -1)
        distances[image][:, inside] = (sides / strides[inside, None]).T * noise[image][:, inside]
        logits[image, rows[box, 1].long(), inside] += 4
    return distances, logits


class Oriented(NamedTuple):
    """Rows (N, 7), distances (B, 4R, A), angles (B, 1, A) and class logits (B, C, A)."""

    rows: Tensor
    dist: Tensor
    angle: Tensor
    scores: Tensor


@lru_cache(maxsize=2)
def oriented_of(case: Case) -> Oriented:
    """The boxes of the case turned anyhow, and predictions within some 15 % of the box around an anchor that know its class."""
    generator = torch.Generator().manual_seed(1)
    turn = math.pi * (torch.rand(len(case.rows), 1, generator=generator) - 0.25)
    rows = torch.cat([case.rows, turn], 1)
    points, strides = make_anchors(case.feat_shapes, STRIDES)
    num_anchors = len(points)
    distances = torch.empty(case.batch_size, 4, num_anchors).log_normal_(0.5, 0.7, generator=generator)
    angle = math.pi * (torch.rand(case.batch_size, 1, num_anchors, generator=generator) - 0.25)
    logits = torch.randn(case.batch_size, case.num_classes, num_anchors, generator=generator) * 1.5 - 5
    noise = torch.empty_like(distances).log_normal_(0, 0.15, generator=generator)
    for image in range(case.batch_size):
        of_image = rows[rows[:, 0] == image]
        boxes = of_image[:, 2:] * torch.tensor([*[float(case.imgsz)] * 4, 1.0])
        sides = sides_from((points * strides[:, None])[:, None], boxes)
        box = sides.amin(2).argmax(1)
        inside = (sides.amin(2).amax(1) > 0).nonzero().squeeze(1)
        of_box = sides[inside, box[inside]] / strides[inside, None]
        distances[image][:, inside] = of_box.T * noise[image][:, inside]
        angle[image, 0, inside] = boxes[box[inside], 4] + 0.1 * torch.randn(len(inside), generator=generator)
        logits[image, of_image[box[inside], 1].long(), inside] += 4
    return Oriented(rows, distance_logits(distances, case.reg_max, generator), angle, logits)


class Masks(NamedTuple):
    """Coefficients (B, M, A), prototypes (B, M, h, w), images of numbers (B, h, w)."""

    coefficients: Tensor
    prototypes: Tensor
    images: Tensor


@lru_cache(maxsize=2)
def masks_of(case: Case) -> Masks:
    """An ellipse in every box, the later rows in front; predictions that know nothing."""
    generator = torch.Generator().manual_seed(2)
    side, num_anchors = case.imgsz // _PIXEL, sum(height * width for height, width in case.feat_shapes)
    coefficients = torch.randn(case.batch_size, _CHANNELS, num_anchors, generator=generator)
    prototypes = torch.randn(case.batch_size, _CHANNELS, side, side, generator=generator) / 4
    images = torch.zeros(case.batch_size, side, side, dtype=torch.int16)
    centre, counts = (torch.arange(side) + 0.5) / side, [0] * case.batch_size
    for image, _, x, y, width, height in case.rows.tolist():
        counts[int(image)] += 1
        ellipse = ((centre[None, :] - x) / width) ** 2 + ((centre[:, None] - y) / height) ** 2 < 0.25
        images[int(image)][ellipse] = counts[int(image)]
    return Masks(coefficients, prototypes, images)


@lru_cache(maxsize=2)
def keypoints_of(case: Case) -> tuple[Tensor, Tensor]:
    """Raw keypoints (B, 17 * 3, A) of a network that has learnt something, and true ones (N, 17, 3), two thirds visible."""
    generator = torch.Generator().manual_seed(2)
    num_anchors = sum(height * width for height, width in case.feat_shapes)
    raw = torch.randn(case.batch_size, _KEYPOINTS, 3, num_anchors, generator=generator)
    centre, size = case.rows[:, None, 2:].split(2, 2)
    places = centre + size * (torch.rand(len(case.rows), _KEYPOINTS, 2, generator=generator) - 0.5)
    flags = torch.randint(3, (len(case.rows), _KEYPOINTS, 1), generator=generator)
    return raw.flatten(1, 2), torch.cat([places, flags], 2)


def _coco_images(data: Path | None, num_classes: int) -> list[Tensor]:
    """(class, cx, cy, w, h) of the boxes of ``_MOSAIC`` images of COCO at a time."""
    if not has_coco(data):
        raise FileNotFoundError("boxes 'coco' need a folder with coco_boxes.json: TRITON_YOLO_DATA or --data")
    boxes = json.loads((data / "coco_boxes.json").read_text())
    classes = sorted({box["category_id"] for box in boxes})
    by_image: dict[int, list[list[float]]] = {}
    for box in boxes:
        x, y, width, height = box["bbox"]
        width, height = min(width, _CANVAS - x), min(height, _CANVAS - y)
        label = classes.index(box["category_id"]) % num_classes
        by_image.setdefault(box["image_id"], []).append([label, x + width / 2, y + height / 2, width, height])
    images = [torch.tensor(image) for image in by_image.values()]
    mosaics = [torch.cat(images[i : i + _MOSAIC]) for i in range(0, len(images), _MOSAIC)]
    return [mosaic / mosaic.new_tensor([1, *[_CANVAS] * 4]) for mosaic in mosaics]


def _lognormal_image(number: int, num_classes: int, seed: int) -> Tensor:
    """(class, cx, cy, w, h) with COCO's sizes: median side 46 px, 5 % under 11 and 5 % over 349."""
    generator = torch.Generator().manual_seed(seed)
    deviation, elongation = torch.randn(2, number, 1, generator=generator).unbind()
    side = 46 / _CANVAS * torch.exp(deviation * torch.where(deviation < 0, 0.87, 1.23))
    aspect = torch.exp(0.3 * elongation)
    size = torch.cat([side * aspect, side / aspect], 1).clamp(max=0.999)
    centre = size / 2 + (1 - size) * torch.rand(number, 2, generator=generator)
    labels = torch.randint(num_classes, (number, 1), generator=generator)
    return torch.cat([labels, centre, size], 1)
