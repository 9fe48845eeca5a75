"""LibreYOLO's YOLOX models with this package's loss: ``patch()`` before training.

Its YOLOv9 is left alone: there an anchor is a candidate only of boxes within the range of its distance bins, and a box
without a candidate is given one, so that the loss is another.
"""

import importlib
from typing import Any

from ..losses import YOLOXLossOutput
from . import _yolox_head
from ._patching import Patch, Replacement

TESTED = "libreyolo 1.6.0"


def patch() -> None:
    """Compute the losses of LibreYOLO's YOLOX heads with this package from now on, in this process.

    ``get_losses`` returns the same named values as before, all 0-d tensors, only ``total_loss`` with a gradient. It reads
    ``use_l1`` at every call. A head whose class changes the assignment keeps the stock loss, with a warning.

    Raises:
        ImportError: LibreYOLO is not installed.
        RuntimeError: its internals are not those that were tested.
    """
    _PATCH.patch()


def _find() -> list[Replacement]:
    module: Any = importlib.import_module("libreyolo.models.yolox.nn")
    return _yolox_head.replacements(module.YOLOXHead, TESTED, _named)


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
