"""Ground truth in every usual form, packed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops
from ._precision import working
from ._rows import is_valid
from ._signatures import UnpackRows


class Targets(NamedTuple):
    """Ground truth of a batch, one row a box, in any order.

    A row with a negative image index is padding and is ignored; so is a box with a non-positive or non-finite side or a
    non-finite corner. The slot of a box in its image, which decides ties, is its order of appearance.
    On the CPU the criteria raise a ValueError for an image index or a label out of range; on other devices such a check would
    synchronise, and the row is ignored (``validate`` checks there too).

    Attributes:
        image_index: (N,) int64.
        labels: (N,) int64.
        boxes_xyxy: (N, 4) corners in pixels, float32 or float64.
        boxes_xywh: (N, 4) the same boxes as centre, width, height.
    """

    image_index: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    boxes_xywh: Tensor

    @classmethod
    def from_yolo(cls, rows: Tensor, imgsz: float | Sequence[float]) -> "Targets":
        """Take rows (N, 6) of (image index, class, cx, cy, w, h), boxes normalised to 0-1 of the image.

        Args:
            rows: any float type; computed in float32 (float64 for float64).
            imgsz: (height, width) of the image in pixels, or one number for both.

        Raises:
            ValueError: ``rows`` is not (N, 6), or ``imgsz`` is neither one number nor two.
            TypeError: ``rows`` is not a float tensor.
        """
        _checks.tensor("targets", rows, ("N", 6))
        height, width = (imgsz, imgsz) if isinstance(imgsz, (int, float)) else _pair(imgsz)
        return cls(*_ops.unpack_rows(UnpackRows(rows.detach(), width, height)))

    @classmethod
    def from_padded(cls, labels: Tensor, boxes: Tensor, mask: Tensor | None = None, box_format: str = "xyxy") -> "Targets":
        """Take padded ground truth in pixels.

        Args:
            labels: (B, G) or (B, G, 1).
            boxes: (B, G, 4).
            mask: (B, G) or (B, G, 1), true where there is a box. Without it every box with positive sides counts.
            box_format: ``"xyxy"`` or ``"xywh"`` (centre, width, height).

        Raises:
            ValueError: sizes do not agree or ``box_format`` is unknown.
            TypeError: ``boxes`` is not a float tensor.
        """
        _checks.one_of("box_format", box_format, ("xyxy", "xywh"))
        _checks.tensor("boxes", boxes, ("B", "G", 4))
        batch_size, num_slots = boxes.shape[:2]
        labels = _checks.per_slot("labels", labels, boxes)
        image_index = torch.arange(batch_size, device=boxes.device).unsqueeze(1).expand(-1, num_slots)
        if mask is not None:
            image_index = torch.where(_checks.per_slot("mask", mask, boxes).bool(), image_index, -1)
        else:
            low, high = boxes.split(2, -1)
            image_index = torch.where((high > (low if box_format == "xyxy" else 0.0)).all(-1), image_index, -1)
        make = cls._from_xyxy if box_format == "xyxy" else cls._from_xywh
        return make(image_index.reshape(-1), labels.reshape(-1).long(), working(boxes).reshape(-1, 4))

    @classmethod
    def from_list(cls, targets: Sequence[Mapping[str, Tensor]]) -> "Targets":
        """Take one mapping an image with ``boxes`` (n, 4) in xyxy pixels and ``labels`` (n,), as torchvision's detectors do.

        Raises:
            ValueError: the list is empty, a key is missing or sizes do not agree.
        """
        _checks.require(len(targets) > 0, "targets", "have one mapping an image", "an empty list")
        for image, target in enumerate(targets):
            missing = {"boxes", "labels"} - set(target)
            _checks.require(not missing, f"targets[{image}]", "have the keys 'boxes' and 'labels'", sorted(target))
            _checks.tensor(f"targets[{image}]['boxes']", target["boxes"], ("n", 4))
            _checks.tensor(f"targets[{image}]['labels']", target["labels"], target["boxes"].shape[:1], is_float=False)
        device = targets[0]["boxes"].device
        counts = [len(target["boxes"]) for target in targets]
        image_index = torch.cat([torch.full((n,), image, device=device) for image, n in enumerate(counts)])
        labels = torch.cat([target["labels"] for target in targets])
        return cls._from_xyxy(image_index, labels.long(), torch.cat([working(t["boxes"]) for t in targets]))

    def validate(self, batch_size: int, num_classes: int) -> None:
        """Raise a ValueError if an image index or a label is out of range. Synchronises."""
        _checks.rows_in_range(self.image_index.cpu(), self.labels.cpu(), batch_size, num_classes)

    def is_valid(self, batch_size: int, num_classes: int) -> Tensor:
        """Which rows (N,) count as ground truth."""
        return is_valid(self.image_index, self.labels, self.boxes_xyxy, batch_size, num_classes)

    @classmethod
    def _from_xywh(cls, image_index: Tensor, labels: Tensor, boxes: Tensor) -> "Targets":
        centre, size = boxes.split(2, -1)
        return cls(image_index, labels, torch.cat([centre - size / 2, centre + size / 2], -1), boxes)

    @classmethod
    def _from_xyxy(cls, image_index: Tensor, labels: Tensor, boxes: Tensor) -> "Targets":
        low, high = boxes.split(2, -1)
        return cls(image_index, labels, boxes, torch.cat([(low + high) / 2, high - low], -1))


def _pair(imgsz: Sequence[float]) -> tuple[float, float]:
    _checks.require(len(imgsz) == 2, "imgsz", "be (height, width)", tuple(imgsz))
    return imgsz[0], imgsz[1]
