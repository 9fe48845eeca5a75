"""A small one-stage detector: convolutional backbone, feature pyramid, one anchor-free head shared by three levels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16, 32)
WIDTHS = (16, 32, 48, 64, 96)
NECK = 64


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm, activation. GroupNorm knows no batch, so several processes compute what one does."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(width, width // 2), conv(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Backbone(nn.Module):
    """Image -> features of strides 8, 16, 32."""

    def __init__(self) -> None:
        super().__init__()
        stem, first, *widths = WIDTHS
        self.stem = nn.Sequential(conv(3, stem, stride=2), conv(stem, first, stride=2))
        self.stages = nn.ModuleList(
            nn.Sequential(conv(inputs, outputs, stride=2), Residual(outputs), Residual(outputs))
            for inputs, outputs in zip([first, *widths[:-1]], widths, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Pyramid(nn.Module):
    """Top-down path: coarse features are added to fine ones, all of one width (FPN, arXiv 1612.03144)."""

    def __init__(self) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, NECK, 1) for width in WIDTHS[2:])
        self.smooth = nn.ModuleList(conv(NECK, NECK) for _ in STRIDES)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for fine in reversed(range(len(levels) - 1)):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], scale_factor=2.0)
        return [smooth(x) for smooth, x in zip(self.smooth, levels, strict=True)]


class Head(nn.Module):
    """Two towers, for boxes and for classes, applied to every level; outputs are channel-first, levels joined."""

    def __init__(self, box_outputs: int, class_outputs: int) -> None:
        super().__init__()
        self.box_tower, self.class_tower = conv(NECK, NECK), conv(NECK, NECK)
        self.boxes, self.classes = nn.Conv2d(NECK, box_outputs, 1), nn.Conv2d(NECK, class_outputs, 1)
        for layer in (self.boxes, self.classes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        boxes = [self.boxes(self.box_tower(x)).flatten(2) for x in levels]
        classes = [self.classes(self.class_tower(x)).flatten(2) for x in levels]
        return torch.cat(boxes, -1), torch.cat(classes, -1)


class YOLO11Head(Head):
    """Distance logits (B, 4R, A) and class logits (B, C, A)."""

    def __init__(self, num_classes: int, reg_max: int) -> None:
        super().__init__(4 * reg_max, num_classes)
        nn.init.constant_(self.classes.bias, logit(0.01))
        # Short distances first: the mean starts near 1.5 cells instead of reg_max / 2.
        with torch.no_grad():
            self.boxes.bias.copy_(-0.5 * torch.arange(reg_max).repeat(4))


class YOLOXHead(Head):
    """Raw (B, 5 + C, A): dx, dy, log w, log h, objectness, classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(5, num_classes)
        nn.init.constant_(self.classes.bias, logit(0.01))
        with torch.no_grad():
            self.boxes.bias.copy_(torch.tensor([0.5, 0.5, math.log(3.0), math.log(3.0), logit(0.01)]))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor]:  # type: ignore[override]
        return (torch.cat(super().forward(levels), 1),)


class Detector(nn.Module):
    """Images (B, 3, H, W) in 0-1, sides divisible by 32 -> the outputs of the head, a tuple of (B, channels, A)."""

    def __init__(self, num_classes: int, head: str = "yolo11", reg_max: int = 16) -> None:
        super().__init__()
        self.backbone, self.pyramid = Backbone(), Pyramid()
        self.head = YOLO11Head(num_classes, reg_max) if head == "yolo11" else YOLOXHead(num_classes)
        self.num_classes, self.reg_max = num_classes, reg_max

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.pyramid(self.backbone(images - 0.5)))


def feature_shapes(images: Tensor) -> list[tuple[int, int]]:
    """(height, width) of every level in cells."""
    height, width = images.shape[-2:]
    return [(height // stride, width // stride) for stride in STRIDES]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
