"""The criterion that ``--loss`` names, called with the head's outputs, the feature shapes and YOLO rows."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from detector import STRIDES
from torch import Tensor

import triton_yolo as ty

LOSSES = ("yolo11", "yolox", "reference-yolo11", "reference-yolox")
LossOutput = ty.YOLO11LossOutput | ty.YOLOXLossOutput


class ReferenceYOLOXLoss:
    """``reference.yolox_loss`` with the switch of ``YOLOXLoss``."""

    use_l1 = False

    def __call__(self, preds: Tensor, shapes: list[tuple[int, int]], targets: Tensor) -> LossOutput:
        return reference().yolox_loss(preds, shapes, targets, strides=STRIDES, use_l1=self.use_l1)


def make_criterion(
    name: str, num_classes: int, reg_max: int, process_group: dist.ProcessGroup | None = None
) -> Callable[..., LossOutput]:
    """``reference-*`` are the same mathematics in plain PyTorch; they know no process group."""
    match name:
        case "yolo11":
            return ty.YOLO11Loss(num_classes, strides=STRIDES, reg_max=reg_max, process_group=process_group)
        case "yolox":
            return ty.YOLOXLoss(num_classes, strides=STRIDES, process_group=process_group)
        case "reference-yolo11":
            return partial(reference().yolo11_loss, strides=STRIDES, reg_max=reg_max)
        case "reference-yolox":
            return ReferenceYOLOXLoss()
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")


def reference() -> Any:
    """The repository's ``reference/``, which is not installed."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)
    import reference

    return reference
