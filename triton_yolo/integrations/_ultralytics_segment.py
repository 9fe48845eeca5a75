"""The segmentation criterion of Ultralytics, computed with this package's."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses import YOLO11SegmentationLoss
from ._patching import kept, unexpected
from ._stock import Stock, say_what_stays
from ._ultralytics_detect import MEMBERS, inputs, options, settings, weighted
from ._ultralytics_version import subject


def segment_loss(owner: Any) -> Any:
    stock, computation = owner.loss, Stock(owner, "loss", MEMBERS, settings)

    @functools.wraps(stock)
    def loss(self: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            prototypes = preds["proto"]
            difference = computation.difference(self)
            if difference is None and not isinstance(prototypes, Tensor):
                difference = "its prototypes have a semantic part"
            if difference:
                say_what_stays("ultralytics", type(self).__name__, difference)
                return stock(self, preds, batch)
            dist, scores, shapes, rows = inputs(self, preds, batch)
            coefficients, masks = preds["mask_coefficient"].transpose(1, 2), batch["masks"].to(dist.device)
            criterion, names = _criterion(self, dist.device), self.loss_names
        except (AttributeError, KeyError) as error:
            raise unexpected(*subject(), f"the criterion's settings or inputs have changed: {error}") from error
        out = criterion(dist, scores, coefficients, prototypes, shapes, rows, masks)
        terms = out.box, out.mask, out.cls, out.dfl, torch.zeros_like(out.mask)  # the last is the semantic one
        return out.loss.reshape(1), dict(zip(names, terms, strict=True))

    return loss


def _criterion(stock: Any, device: torch.device) -> YOLO11SegmentationLoss:
    """Our criterion with the settings that the stock one has at this moment."""
    own = {"mask_gain": stock.hyp.box, "overlap_mask": stock.overlap}
    return kept(weighted, device, YOLO11SegmentationLoss, stock.class_weights, **own, **options(stock))
