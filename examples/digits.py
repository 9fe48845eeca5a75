"""Scenes of real handwritten digits: a detection data set that needs no download."""

import cv2
import numpy as np
from samples import Sample, area
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class DigitScenes(Dataset[Sample]):
    """One to eight digits of scikit-learn's handwritten set on a noisy ground, composed anew every epoch.

    A scene depends on the seed, the epoch and its index only. Validation uses other handwriting than training.
    """

    classes = tuple("0123456789")

    def __init__(self, length: int, imgsz: int, *, is_train: bool, seed: int = 0) -> None:
        digits = load_digits()
        is_held_out = np.arange(len(digits.target)) % 5 == 0
        kept = is_held_out != is_train
        self.ink, self.labels = (digits.images[kept] / 16).astype(np.float32), digits.target[kept]
        self.length, self.imgsz, self.is_train, self.seed = length, imgsz, is_train, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, self.is_train, self.epoch if self.is_train else 0, index])
        image = (rng.integers(0, 100, 3) + rng.integers(0, 40, (self.imgsz, self.imgsz, 1), np.uint8)).astype(np.float32)
        boxes, labels = np.empty((0, 4), np.float32), []
        for _ in range(rng.integers(1, 9)):
            digit = rng.integers(len(self.ink))
            side = round(np.exp(rng.uniform(np.log(12), np.log(0.4 * self.imgsz))))
            ink = cv2.resize(self.ink[digit], (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
            corner = find_room(ink_extent(ink), boxes, self.imgsz - side, rng)
            if corner is None:
                continue
            x, y = corner
            patch = image[y : y + side, x : x + side]
            patch += ink[..., None] * (rng.integers(150, 256, 3) - patch)
            boxes = np.vstack([boxes, ink_extent(ink) + np.tile(corner, 2)])
            labels.append(self.labels[digit])
        return Sample(image.astype(np.uint8), boxes.astype(np.float32), np.array(labels))


def ink_extent(ink: np.ndarray) -> np.ndarray:
    """The box of what is visible."""
    y, x = np.nonzero(ink > 0.25)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def find_room(
    box: np.ndarray, boxes: np.ndarray, last: int, rng: np.random.Generator, max_share: float = 0.1
) -> np.ndarray | None:
    """A random corner at which ``box`` and each of ``boxes`` have at most ``max_share`` of the smaller one in common."""
    for corner in rng.integers(0, last + 1, (20, 2)):
        moved = (box + np.tile(corner, 2))[None]
        sides = np.minimum(boxes[:, 2:], moved[:, 2:]) - np.maximum(boxes[:, :2], moved[:, :2])
        if (sides.clip(min=0).prod(1) <= max_share * np.minimum(area(boxes), area(moved))).all():
            return corner
    return None
