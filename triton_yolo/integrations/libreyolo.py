"""LibreYOLO's YOLOX and YOLOv9 models with this package's losses: ``patch()`` before training."""

from typing import Any

import torch.distributed as dist

from ..losses import YOLOXLossOutput
from . import _yolo9_loss, _yolox_head
from ._patching import Patch, Replacement, import_trainer

__all__ = ["patch", "patched", "unpatch"]
TESTED = "libreyolo 1.6.0"


def patch() -> None:
    """Compute the losses of LibreYOLO's YOLOX and YOLOv9 with this package from now on, in this process.

    Both return the same named values as before, all 0-d tensors, only ``total_loss`` with a gradient. YOLOX's head reads
    ``use_l1`` at every call. YOLOv9's criterion, that of every branch of its models, keeps its own matcher. A head or a
    criterion of which somebody has replaced a part that the losses use keeps the stock loss, which is logged once.

    Raises:
        ImportError: LibreYOLO is not installed.
        RuntimeError: its internals are not those that were tested.
    """
    _PATCH.patch()


def _find() -> list[Replacement]:
    yolox, yolo9 = import_trainer("libreyolo", "libreyolo.models.yolox.nn", "libreyolo.models.yolo9.loss")
    return [*_yolox_head.replacements(yolox.YOLOXHead, TESTED, _named, _is_global), *_yolo9_loss.replacements(yolo9, TESTED)]


def _is_global(head: Any) -> bool:
    """Whether YOLOX's head normalises over all ranks: it does unless the first validates, for which the others do not wait."""
    return dist.is_available() and dist.is_initialized() and (head.training or not head.emit_loss_outputs)


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
