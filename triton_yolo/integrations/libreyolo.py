"""LibreYOLO's YOLOX and YOLOv9 models with this package's losses: ``patch()`` before training."""

from typing import Any

from ..losses import YOLOXLossOutput
from . import _yolo9_loss, _yolox_head
from ._patching import Patch, Replacement, import_trainer

__all__ = ["patch", "patched", "unpatch"]
TESTED = "libreyolo 1.6.0"


def patch() -> None:
    """Compute the losses of LibreYOLO's YOLOX and YOLOv9 with this package from now on, in this process.

    Both return the same named values as before, all 0-d tensors, only ``total_loss`` with a gradient. YOLOX's head reads
    ``use_l1`` at every call. YOLOv9's criterion, that of every branch of its models, keeps its own matcher. A head whose class
    changes the assignment, and a criterion whose class or terms are others, keep the stock loss, with a warning.

    Raises:
        ImportError: LibreYOLO is not installed.
        RuntimeError: its internals are not those that were tested.
    """
    _PATCH.patch()


def _find() -> list[Replacement]:
    yolox, yolo9 = import_trainer("libreyolo", "libreyolo.models.yolox.nn", "libreyolo.models.yolo9.loss")
    return [*_yolox_head.replacements(yolox.YOLOXHead, TESTED, _named), *_yolo9_loss.replacements(yolo9, TESTED)]


def _named(out: YOLOXLossOutput) -> dict[str, Any]:
    return {
        "total_loss": out.loss,
        "iou_loss": out.iou,
        "obj_loss": out.obj,
        "cls_loss": out.cls,
        "l1_loss": out.l1,
        "num_fg": out.num_fg,
    }


_PATCH = Patch(_find)
unpatch, patched = _PATCH.unpatch, _PATCH.patched
