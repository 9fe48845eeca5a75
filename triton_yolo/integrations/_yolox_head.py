"""What YOLOX's heads need to compute their losses with this package; the same for everyone who has that head."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..losses import YOLOXLoss, YOLOXLossOutput
from ..targets import Targets
from ._patching import Replacement, kept, require, unexpected
from ._stock import BCE, Stock

Result = Callable[[YOLOXLossOutput], Any]  # puts the output into the form that the head returns

_LOSS_INPUTS = ("imgs", "x_shifts", "y_shifts", "expanded_strides", "labels", "outputs", "origin_preds", "dtype")
_DECODER_INPUTS = ("output", "k", "stride", "dtype")
_MATCHING = {  # method of the head that decides about candidates -> which they are and the radius of their centre region
    "get_geometry_constraint": ("center", 1.5),
    "get_in_boxes_info": ("box_and_center", 2.5),  # the paper's, in releases up to 0.3.0
}
_PARTS = (*_MATCHING, "get_assignments", "get_l1_target", "simota_matching", "dynamic_k_matching")  # of the stock loss
_SUBJECT = "this YOLOX head"
_IOU_GAIN = 5.0  # built into the stock loss


def replacements(head: Any, tested: str, result: Result) -> list[Replacement]:
    """What to replace in a class of heads.

    Args:
        head: the class.
        tested: the packages and versions that errors name.
        result: see ``Result``.

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
    return [
        (head, "get_output_and_grid", _remembering(head, raw)),
        (head, "get_losses", _losses(head, raw, tested, result)),
    ]


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


def _losses(owner: Any, raw: WeakKeyDictionary, tested: str, result: Result) -> Any:
    stock, parts, computation = owner.get_losses, _parts(owner), _computation(owner)

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
        changed = type(self).__name__ if _parts(type(self)) != parts else computation.difference(self)
        if changed:
            _warn_once(changed)
            raw.pop(self, None)
            return stock(self, imgs, x_shifts, y_shifts, expanded_strides, labels, outputs, origin_preds, dtype)
        levels = raw.pop(self, {})
        maps = [levels[k] for k in sorted(levels)]
        shapes = [tuple(level.shape[-2:]) for level in maps]
        num_anchors = sum(height * width for height, width in shapes)
        has_all = num_anchors == outputs.shape[1]
        require(_SUBJECT, tested, has_all, f"the head decoded {num_anchors} anchors, its loss has {outputs.shape[1]}")
        preds = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
        labels = labels if labels.is_floating_point() else labels.float()
        targets = Targets.from_padded(labels[..., 0], labels[..., 1:5], box_format="xywh")
        return result(_criterion(self, preds.device, tested)(preds, shapes, targets))

    return get_losses


def _computation(owner: Any) -> Stock:
    """The stock losses of a head."""
    iou_loss = next(kind for name, kind in vars(inspect.getmodule(owner)).items() if name.lower() == "iouloss")
    members = {
        "bcewithlog_loss": BCE,
        "l1_loss": (nn.L1Loss, {"reduction": "none"}),
        "iou_loss": (iou_loss, {"reduction": "none"}),
    }
    # Drawing, initial weights and what decodes for inference are no part of the losses.
    others = ("visualize_assign_result", "initialize_biases", "decode_outputs", "forward", "forward_train_maps")
    replaced = [(owner, name) for name in ("get_losses", "get_output_and_grid", *others)]
    return Stock([owner, iou_loss], members, replaced)


def _criterion(head: Any, device: torch.device, tested: str) -> YOLOXLoss:
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
            use_l1=head.use_l1,
        )
    except AttributeError as error:
        raise unexpected(_SUBJECT, tested, f"the head's settings have changed: {error}") from error


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(f"{name} changes YOLOX's assignment or loss: the stock loss stays", stacklevel=3)
