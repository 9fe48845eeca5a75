"""YOLOX's trainers with this package's loss: ``patch()`` before training.

For Megvii's ``yolox`` and its fork ``pixeltable-yolox``, which both import as ``yolox``. What changes is how the head computes
its losses; heads, models and checkpoints stay YOLOX's own objects.
"""

from . import _yolox_head
from ._patching import Patch, Replacement, import_trainer

__all__ = ["patch", "patched", "unpatch"]
TESTED = "pixeltable-yolox 0.4.3, yolox 0.3.0"


def patch() -> None:
    """Compute the losses of YOLOX's heads with this package from now on, in this process.

    ``get_losses`` returns six values as before, all 0-d tensors, only the first with a gradient: the loss and its parts IoU
    (with its gain), objectness, class and L1, and positive anchors per box. It reads ``use_l1`` at every call; labels are
    padded (B, G, 5) rows of class, cx, cy, w, h in pixels, of any float type. A head of which
    somebody has replaced a part that the losses use, in its class or in the object, keeps the stock loss, which is logged once.

    Raises:
        ImportError: ``yolox`` is not installed.
        RuntimeError: its internals are not those that were tested.
    """
    _PATCH.patch()


def _find() -> list[Replacement]:
    (module,) = import_trainer("yolox", "yolox.models.yolo_head")
    head = getattr(module, "YOLOXHead", None) or getattr(module, "YoloxHead", None)
    return _yolox_head.replacements(head, TESTED, tuple, is_global=lambda head: False)


_PATCH = Patch(_find)
unpatch, patched = _PATCH.unpatch, _PATCH.patched
