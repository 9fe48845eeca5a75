"""Images with boxes, and batches of them in the rows that the criteria take."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Sample:
    """An image (H, W, 3) in RGB with its boxes (n, 4) in pixels and their classes (n,)."""

    image: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray


@dataclass
class Batch:
    """Images (B, 3, H, W), uint8, and a row (image index, class, cx, cy, w, h) for every box, normalised to 0-1: (N, 6)."""

    images: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.images.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.targets.pin_memory())


def collate(samples: list[Sample]) -> Batch:
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()
    rows = [yolo_rows(sample, index) for index, sample in enumerate(samples)]
    return Batch(images, torch.from_numpy(np.concatenate(rows)))


def yolo_rows(sample: Sample, image_index: int) -> np.ndarray:
    height, width = sample.image.shape[:2]
    low, high = sample.boxes_xyxy[:, :2], sample.boxes_xyxy[:, 2:]
    boxes = np.concatenate([(low + high) / 2, high - low], 1) / (width, height, width, height)
    return np.column_stack([np.full(len(boxes), image_index), sample.labels, boxes]).astype(np.float32)


def area(boxes_xyxy: np.ndarray) -> np.ndarray:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
