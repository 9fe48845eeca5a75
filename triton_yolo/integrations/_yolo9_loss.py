"""What LibreYOLO's YOLOv9 needs to compute its loss with this package.

The assignment stays with its own matcher, whose candidates are not those of ``YOLO11Loss``; the loss that follows is the same.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import YOLO11Loss, YOLO11LossOutput
from ..targets import Targets
from ._patching import Replacement, kept, require, unexpected
from ._stock import BCE, Stock, is_elementwise, say_what_stays

_SUBJECT = "LibreYOLO's YOLOv9"
_EXPECTED = (
    ("YOLO9Loss", "__call__", ("predictions", "targets")),
    ("YOLO9Loss", "_global_cls_norm", ("targets_cls",)),
    ("Vec2Box", "__call__", ("predicts",)),
    ("BoxMatcher", "__call__", ("target", "predict", "return_indices")),
)
_MODULE = "libreyolo.models.yolo9.loss"
_MEMBERS = {
    "cls_loss": (f"{_MODULE}.BCELoss",),
    "cls_loss.bce": (BCE,),
    "box_loss": (f"{_MODULE}.BoxLoss",),
    "dfl_loss": (f"{_MODULE}.DFLoss",),
    "matcher": (f"{_MODULE}.BoxMatcher",),
    "vec2box": (f"{_MODULE}.Vec2Box",),
}
_ALIASES = {"calculate_iou": "compute_iou"}


def replacements(module: Any, tested: str) -> list[Replacement]:
    """What to replace in the module of the criterion.

    Args:
        module: ``libreyolo.models.yolo9.loss``.
        tested: the version that errors name.

    Raises:
        RuntimeError: the module is not as expected.
    """
    for owner, name, inputs in _EXPECTED:
        method = vars(getattr(module, owner, object)).get(name)
        found = tuple(inspect.signature(method).parameters) if inspect.isfunction(method) else None
        require(_SUBJECT, tested, found == ("self", *inputs), f"{owner}.{name} takes {found}, expected {('self', *inputs)}")
    for name in ("BCELoss", "BoxLoss", "DFLoss"):
        require(_SUBJECT, tested, hasattr(module, name), f"{name} is gone")
    return [(module.YOLO9Loss, "__call__", _criterion_call(module, tested))]


def _criterion_call(module: Any, tested: str) -> Any:
    owner = module.YOLO9Loss
    stock, computation = owner.__call__, Stock(owner, "__call__", _MEMBERS, _settings, aliases=_ALIASES)

    @functools.wraps(stock)
    def call(self: Any, predictions: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
        try:
            difference = computation.difference(self)
            if difference:
                say_what_stays("libreyolo", type(self).__name__, difference)
                return stock(self, predictions, targets)
            width, height = self.vec2box.image_size
            settings = self.num_classes, tuple(self.strides), self.reg_max, _gains(self)
            matcher = self.matcher
        except AttributeError as error:
            raise unexpected(_SUBJECT, tested, f"the criterion's settings have changed: {error}") from error
        num_classes, strides, reg_max, gains = settings
        targets = targets * targets.new_tensor([1, width, height, width, height])
        with torch.no_grad():
            scores, _, boxes = self.vec2box(predictions)
            matched, is_positive, indices = matcher(targets, (scores, boxes), return_indices=True)
            target_scores = matched[..., :num_classes]
            norm = self._global_cls_norm(target_scores)
        batch_size, num_gt, _ = targets.shape
        first_row = torch.arange(batch_size, device=indices.device)[:, None] * num_gt
        target_row = torch.where(is_positive, first_row + indices, -1)

        preds = torch.cat([level.flatten(2) for level in predictions], 2).transpose(1, 2)
        pred_dist, pred_scores = preds.split([4 * reg_max, num_classes], 2)
        criterion = kept(YOLO11Loss, preds.device, num_classes, strides=strides, reg_max=reg_max, **gains)
        labels, gt_boxes = targets.flatten(0, 1).split([1, 4], 1)
        image_index = torch.arange(batch_size, device=indices.device).repeat_interleave(num_gt)
        gt = Targets._from_xyxy(image_index, labels.squeeze(1).long(), gt_boxes)
        shapes = [level.shape[2:] for level in predictions]
        out = criterion.loss_of(pred_dist, pred_scores, shapes, gt, target_row, target_scores.sum(-1), norm)
        return _named(out.loss / batch_size, out, is_positive.sum() / batch_size)

    return call


def _gains(criterion: Any) -> dict[str, float]:
    return {"box_gain": criterion.box_weight, "cls_gain": criterion.cls_weight, "dfl_gain": criterion.dfl_weight}


def _settings(criterion: Any, _: Any, bce: nn.Module, box_loss: Any, *others: Any) -> dict[str, bool]:
    is_agreed = all(other.reg_max == criterion.reg_max for other in others)
    return {"cls_loss.bce": is_elementwise(bce), "reg_max": is_agreed}


def _named(total: Tensor, out: YOLO11LossOutput, num_fg: Tensor) -> dict[str, Tensor]:
    weighted = {"box_loss": out.box, "dfl_loss": out.dfl, "cls_loss": out.cls}
    return {"total_loss": total, **weighted, "box": out.box, "dfl": out.dfl, "cls": out.cls, "num_fg": num_fg}
