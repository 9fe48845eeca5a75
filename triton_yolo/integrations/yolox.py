"""YOLOX's trainers with this package's loss: ``patch()`` before training.

For Megvii's ``yolox`` and its fork ``pixeltable-yolox``, which both import as ``yolox``. What changes is how the head computes
its losses; heads, models and checkpoints stay YOLOX's own objects.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..losses import YOLOXLoss
from ..targets import Targets
from ._patching import Patch, Replacement

_LOSS_INPUTS = ("imgs", "x_shifts", "y_shifts", "expanded_strides", "labels", "outputs", "origin_preds", "dtype")
_DECODER_INPUTS = ("output", "k", "stride", "dtype")
_MATCHING = {  # method of the head that decides about candidates -> which they are and the radius of their centre region
    "get_geometry_constraint": ("center", 1.5),
    "get_in_boxes_info": ("box_and_center", 2.5),  # the paper's, in releases up to 0.3.0
}
_PARTS = (*_MATCHING, "get_assignments", "get_l1_target", "simota_matching", "dynamic_k_matching")  # of the stock loss
_IOU_GAIN = 5.0  # built into the stock loss


def patch() -> None:
    """Compute the losses of YOLOX's heads with this package from now on, in this process.

    ``get_losses`` returns six values as before, all 0-d tensors, only the first with a gradient: the loss and its parts IoU
    (with its gain), objectness, class and L1, and positive anchors per box. It reads ``use_l1`` at every call; labels are
    padded (B, G, 5) rows of class, cx, cy, w, h in pixels, of any float type. A head whose class changes the assignment keeps
    the stock loss, with a warning.

    Raises:
        ImportError: ``yolox`` is not installed.
        RuntimeError: its internals are not those that were tested.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Undo ``patch``.

    Raises:
        RuntimeError: somebody else has replaced the same methods in the meantime.
    """
    _PATCH.restore()


def patched() -> AbstractContextManager[None]:
    """``patch`` for the length of a ``with`` block."""
    return _PATCH.applied()


def _find() -> list[Replacement]:
    module = importlib.import_module("yolox.models.yolo_head")
    head: Any = getattr(module, "YOLOXHead", None) or getattr(module, "YoloxHead", None)
    _require(head is not None, "yolox.models.yolo_head has neither YOLOXHead nor YoloxHead")
    for name, inputs in (("get_losses", _LOSS_INPUTS), ("get_output_and_grid", _DECODER_INPUTS)):
        method = vars(head).get(name)
        found = tuple(inspect.signature(method).parameters) if callable(method) else None
        _require(found == ("self", *inputs), f"{name} of the head takes {found}, expected {('self', *inputs)}")
    _require(any(name in vars(head) for name in _MATCHING), f"the head has none of {', '.join(_MATCHING)}")
    # The loss starts from the raw output, which the head decodes level by level before it asks for its losses.
    raw: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()
    return [
        (head, "get_output_and_grid", _remembering(head, raw)),
        (head, "get_losses", _losses(head, raw)),
    ]


_PATCH = Patch(_find)


def _remembering(owner: Any, raw: WeakKeyDictionary) -> Any:
    stock, parts = owner.get_output_and_grid, _parts(owner)

    @functools.wraps(stock)
    def get_output_and_grid(self: Any, output: Tensor, k: int, stride: float, dtype: Any) -> Any:
        if _parts(type(self)) == parts:
            raw.setdefault(self, {})[k] = output
            output = output.detach().clone()  # decoded in place, and nothing asks for the gradient of that
        return stock(self, output, k, stride, dtype)

    return get_output_and_grid


def _parts(head: Any) -> list[Any]:
    return [getattr(head, name, None) for name in _PARTS]


def _losses(owner: Any, raw: WeakKeyDictionary) -> Any:
    stock, parts = owner.get_losses, _parts(owner)

    @functools.wraps(stock)
    def get_losses(
        self: Any,
        imgs: Tensor | None,
        x_shifts: Sequence[Tensor],
        y_shifts: Sequence[Tensor],
        expanded_strides: Sequence[Tensor],
        labels: Tensor,
        outputs: Tensor,
        origin_preds: Sequence[Tensor],
        dtype: Any,
    ) -> tuple[Any, ...]:
        if _parts(type(self)) != parts:
            _warn_once(type(self).__name__)
            return stock(self, imgs, x_shifts, y_shifts, expanded_strides, labels, outputs, origin_preds, dtype)
        levels = raw.pop(self, {})
        maps = [levels[k] for k in sorted(levels)]
        shapes = [tuple(level.shape[-2:]) for level in maps]
        num_anchors = sum(height * width for height, width in shapes)
        _require(num_anchors == outputs.shape[1], f"the head decoded {num_anchors} anchors, its loss has {outputs.shape[1]}")
        preds = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
        targets = Targets.from_padded(labels[..., 0], labels[..., 1:5], box_format="xywh")
        return tuple(_criterion(self)(preds, shapes, targets))

    return get_losses


def _criterion(head: Any) -> YOLOXLoss:
    """Our criterion with the settings that the head has at this moment."""
    candidates, radius = next(mode for name, mode in _MATCHING.items() if hasattr(head, name))
    try:
        return YOLOXLoss(
            head.num_classes,
            strides=head.strides,
            candidates=candidates,
            center_radius=radius,
            iou_loss=head.iou_loss.loss_type,
            iou_gain=_IOU_GAIN,
            use_l1=head.use_l1,
        )
    except AttributeError as error:
        raise RuntimeError(_message(f"the head's settings have changed: {error}")) from error


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(f"{name} changes YOLOX's assignment and keeps the stock loss", stacklevel=3)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(_message(what))


def _message(what: str) -> str:
    return f"this yolox is not what the adapter was written for (pixeltable-yolox 0.4.3, Megvii's 0.3.0): {what}"
