"""What YOLOX's heads need to compute their losses with this package; the same for everyone who has that head."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..losses import YOLOXLoss, YOLOXLossOutput
from ..targets import Targets
from ._patching import Replacement, kept, require, unexpected
from ._stock import BCE, Stock, is_elementwise, say_what_stays

Result = Callable[[YOLOXLossOutput], Any]  # puts the output into the form that the head returns
IsGlobal = Callable[[Any], bool]  # whether a head normalises over all ranks

_LOSS_INPUTS = ("imgs", "x_shifts", "y_shifts", "expanded_strides", "labels", "outputs", "origin_preds", "dtype")
_DECODER_INPUTS = ("output", "k", "stride", "dtype")
_MATCHING = {  # method of the head that decides about candidates -> which they are and the radius of their centre region
    "get_geometry_constraint": ("center", 1.5),
    "get_in_boxes_info": ("box_and_center", 2.5),  # the paper's, in releases up to 0.3.0
}
_MEMBERS = {
    "bcewithlog_loss": (BCE,),
    "l1_loss": ("torch.nn.modules.loss.L1Loss",),
    "iou_loss": ("yolox.models.losses.IouLoss", "yolox.models.losses.IOUloss", "libreyolo.models.yolox.loss.IoULoss"),
}
_SUBJECT = "this YOLOX head"
_IOU_GAIN = 5.0  # built into the stock loss


def replacements(head: Any, tested: str, result: Result, is_global: IsGlobal) -> list[Replacement]:
    """What to replace in a class of heads.

    Args:
        head: the class.
        tested: the packages and versions that errors name.
        result: see ``Result``.
        is_global: see ``IsGlobal``.

    Raises:
        RuntimeError: the class is not as expected.
    """
    check = functools.partial(require, _SUBJECT, tested)
    for name, inputs in (("get_losses", _LOSS_INPUTS), ("get_output_and_grid", _DECODER_INPUTS)):
        method = vars(head).get(name)
        found = tuple(inspect.signature(method).parameters) if callable(method) else None
        check(found == ("self", *inputs), f"{name} of the head takes {found}, expected {('self', *inputs)}")
    check(any(name in vars(head) for name in _MATCHING), f"the head has none of {', '.join(_MATCHING)}")
    # The loss starts from the raw output, which the head decodes level by level before it asks for its losses.
    raw: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()
    computation = Stock(head, "get_losses", _MEMBERS, _settings, is_open=True)
    make = functools.partial(_criterion, tested=tested, is_global=is_global)
    return [
        (head, "get_output_and_grid", _remembering(head, raw)),
        (head, "get_losses", _losses(head, raw, computation, make, tested, result)),
    ]


def _settings(_: Any, bcewithlog_loss: nn.Module, l1_loss: nn.Module, iou_loss: Any) -> dict[str, bool]:
    return {
        "bcewithlog_loss": is_elementwise(bcewithlog_loss),
        "l1_loss": is_elementwise(l1_loss),
        "iou_loss": is_elementwise(iou_loss) and iou_loss.loss_type in ("iou", "giou"),
    }


def _remembering(owner: Any, raw: WeakKeyDictionary) -> Any:
    stock = owner.get_output_and_grid

    @functools.wraps(stock)
    def get_output_and_grid(self: Any, output: Tensor, k: int, stride: float, dtype: Any) -> Any:
        raw.setdefault(self, {})[k] = output
        return stock(self, output.clone(), k, stride, dtype)  # it decodes in place

    return get_output_and_grid


def _losses(
    owner: Any, raw: WeakKeyDictionary, computation: Stock, make: Callable[..., YOLOXLoss], tested: str, result: Result
) -> Any:
    stock = owner.get_losses

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
        levels = raw.pop(self, {})
        difference = computation.difference(self) or (None if levels else "somebody else decoded its outputs")
        if difference:
            say_what_stays(owner.__module__.partition(".")[0], type(self).__name__, difference)
            return stock(self, imgs, x_shifts, y_shifts, expanded_strides, labels, outputs, origin_preds, dtype)
        maps = [levels[k] for k in sorted(levels)]
        shapes = [tuple(level.shape[-2:]) for level in maps]
        num_anchors = sum(height * width for height, width in shapes)
        has_all = num_anchors == outputs.shape[1]
        require(_SUBJECT, tested, has_all, f"the head decoded {num_anchors} anchors, its loss has {outputs.shape[1]}")
        preds = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
        labels = labels if labels.is_floating_point() else labels.float()
        targets = Targets.from_padded(labels[..., 0], labels[..., 1:5], box_format="xywh")
        return result(make(self, preds.device)(preds, shapes, targets))

    return get_losses


def _criterion(head: Any, device: torch.device, tested: str, is_global: IsGlobal) -> YOLOXLoss:
    """Our criterion with the settings that the head has at this moment."""
    candidates, radius = next(mode for name, mode in _MATCHING.items() if hasattr(head, name))
    try:
        return kept(
            YOLOXLoss,
            device,
            head.num_classes,
            strides=tuple(head.strides),
            candidates=candidates,
            center_radius=radius,
            iou_loss=head.iou_loss.loss_type,
            iou_gain=_IOU_GAIN,
            use_l1=bool(head.use_l1),
            process_group=is_global(head) or None,
        )
    except AttributeError as error:
        raise unexpected(_SUBJECT, tested, f"the head's settings have changed: {error}") from error
