"""The segmentation criterion of Ultralytics' YOLOv8 and YOLO11, computed with this package's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..losses import YOLO11SegmentationLoss
from ._ultralytics_detect import BY_ROW, MEMBERS, Adapter, inputs_of, options_of, settings


def _options(stock: Any) -> dict[str, Any]:
    return {**options_of(stock), "mask_gain": stock.hyp.box, "overlap_mask": bool(stock.overlap)}


def _inputs(preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
    *parts, shapes, rows = inputs_of(preds, batch, "boxes", "scores", "mask_coefficient")
    return *parts, preds["proto"], shapes, rows, batch["masks"].to(rows.device)


def _objection(preds: Mapping[str, Any]) -> str | None:
    return None if isinstance(preds["proto"], Tensor) else "its prototypes have a semantic part"


def _columns(stock: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (BY_ROW, ("masks",)) if stock.overlap else ((*BY_ROW, "masks"), ())


SEGMENTATION = Adapter(
    MEMBERS,
    settings,
    YOLO11SegmentationLoss,
    _options,
    _inputs,
    ("box", "mask", "cls", "dfl", ""),
    _objection,
    _columns,
)
