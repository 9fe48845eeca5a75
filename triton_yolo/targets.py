"""Ground truth in every usual form, packed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops
from ._precision import working
from ._rows import is_valid
from ._signatures import UnpackRows

FORMATS = ("xyxy", "xywh", "xywhr")


class Targets(NamedTuple):
    """Ground truth of a batch, one row a box, in any order.

    A row with a negative image index is padding and is ignored; so is a box with a non-positive or non-finite side or a
    non-finite corner. The slot of a box in its image, which decides ties, is its order of appearance.
    On the CPU the criteria raise a ValueError for an image index or a label out of range; on other devices such a check would
    synchronise, and the row is ignored (``validate`` checks there too).

    Oriented boxes have an angle, in radians from the x axis towards y, which may be any finite number; with another one a row
    is ignored.

    Attributes:
        image_index: (N,) int64.
        labels: (N,) int64.
        boxes_xyxy: (N, 4) corners in pixels, float32 or float64; those of an oriented box are as if it were upright.
        boxes_xywh: (N, 4) the same boxes as centre, width, height; of oriented boxes (N, 5) with the angle.

    Example:
        >>> rows = torch.tensor([[0, 2, 0.5, 0.5, 0.25, 0.5], [-1, 0, 0, 0, 0, 0]])  # one box and padding
        >>> targets = ty.Targets.from_yolo(rows, imgsz=64)
        >>> targets.boxes_xyxy[0]
        tensor([24., 16., 40., 48.])
        >>> same = ty.Targets.from_list([{"boxes": torch.tensor([[24.0, 16, 40, 48]]), "labels": torch.tensor([2])}])
        >>> same.to("cpu").validate(batch_size=1, num_classes=3)
    """

    image_index: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    boxes_xywh: Tensor

    @classmethod
    def from_yolo(cls, rows: Tensor, imgsz: float | Sequence[float]) -> "Targets":
        """Take rows (N, 6) of (image index, class, cx, cy, w, h), boxes normalised to 0-1 of the image; (N, 7) have an angle.

        Args:
            rows: any float type; computed in float32 (float64 for float64). float16 holds image indices and classes below
                2,048, bfloat16 below 256, and both round boxes: rows are best kept in float32.
            imgsz: (height, width) of the image in pixels, or one number for both.

        Raises:
            ValueError: ``rows`` is neither (N, 6) nor (N, 7), or ``imgsz`` is neither one number nor two; on the CPU also for
                an image index or a class that is no whole number, or more than the type can hold exactly (elsewhere such a row
                is padding).
            TypeError: ``rows`` is not a float tensor.
        """
        _checks.rows("rows", rows)
        return cls(*_ops.unpack_rows(UnpackRows(rows.detach(), _checks.image_size("imgsz", imgsz))))

    @classmethod
    def from_padded(cls, labels: Tensor, boxes: Tensor, mask: Tensor | None = None, box_format: str = "xyxy") -> "Targets":
        """Take padded ground truth in pixels.

        Args:
            labels: (B, G) or (B, G, 1), whole numbers of any type.
            boxes: (B, G, 4), oriented (B, G, 5).
            mask: (B, G) or (B, G, 1), true where there is a box. Without it every box with positive sides counts.
            box_format: ``"xyxy"``, ``"xywh"`` (centre, width, height) or ``"xywhr"`` (the same and the angle).

        Raises:
            ValueError: sizes do not agree or ``box_format`` is unknown; on the CPU also for a label that is no whole number
                (elsewhere such a row is padding).
            TypeError: ``boxes`` is not a float tensor.

        Warns:
            UserWarning: most boxes are shares of an image (on the CPU).
        """
        _checks.one_of("box_format", box_format, FORMATS)
        _checks.tensor("boxes", boxes, ("B", "G", _size(box_format)))
        labels = _checks.per_slot("labels", labels, boxes)
        is_box = _checks.per_slot("mask", mask, boxes).bool() if mask is not None else _has_sides(boxes, box_format)
        image_index = torch.arange(boxes.shape[0], device=boxes.device).unsqueeze(1).where(is_box, -1)
        _check_values("labels", "boxes", labels, boxes, is_box, box_format)
        return cls._from_boxes(image_index.reshape(-1), labels.reshape(-1), working(boxes).flatten(0, 1), box_format)

    @classmethod
    def from_list(cls, targets: Iterable[Mapping[str, Tensor]], box_format: str = "xyxy") -> "Targets":
        """Take one mapping an image, as torchvision's detectors do.

        Args:
            targets: mappings with ``boxes`` (n, 4) in pixels, oriented (n, 5), and ``labels`` (n,).
            box_format: ``"xyxy"``, ``"xywh"`` (centre, width, height; COCO's and torchvision's xywh begin at a corner) or
                ``"xywhr"`` (centre, width, height, angle).

        Raises:
            ValueError: the list is empty, a key is missing, sizes do not agree or ``box_format`` is unknown; on the CPU also
                for a label that is no whole number (elsewhere such a row is padding).
            TypeError: ``targets`` are no mappings, or ``boxes`` no float tensor.

        Warns:
            UserWarning: most boxes are shares of an image (on the CPU).
        """
        _checks.one_of("box_format", box_format, FORMATS)
        targets = _checks.mappings("targets", targets)
        for image, target in enumerate(targets):
            missing = {"boxes", "labels"} - set(target)
            _checks.require(not missing, f"targets[{image}]", "have the keys 'boxes' and 'labels'", sorted(target))
            _checks.tensor(f"targets[{image}]['boxes']", target["boxes"], ("n", _size(box_format)), like=targets[0]["boxes"])
            _checks.tensor(f"targets[{image}]['labels']", target["labels"], target["boxes"].shape[:1], is_float=False)
        device = targets[0]["boxes"].device
        counts = [len(target["boxes"]) for target in targets]
        image_index = torch.cat([torch.full((n,), image, device=device) for image, n in enumerate(counts)])
        labels, boxes = torch.cat([t["labels"] for t in targets]), torch.cat([working(t["boxes"]) for t in targets])
        _check_values("labels of targets", "boxes of targets", labels, boxes, image_index >= 0, box_format)
        return cls._from_boxes(image_index, labels, boxes, box_format)

    @classmethod
    def _of_slots(cls, labels: Tensor, boxes: Tensor, is_box: Tensor, names: tuple[str, str]) -> "Targets":
        """Padded ground truth (B, G) of an assigner, whose arguments have these names; boxes are xyxy or xywhr."""
        box_format = "xyxy" if boxes.shape[2] == 4 else "xywhr"
        _check_values(*names, labels, boxes, is_box, box_format)
        image_index = torch.arange(boxes.shape[0], device=boxes.device).unsqueeze(1).where(is_box, -1)
        return cls._from_boxes(image_index.reshape(-1), labels.reshape(-1), working(boxes).flatten(0, 1), box_format)

    def to(self, device: torch.device | str) -> "Targets":
        """Return the same targets on another device."""
        return Targets(*(field.to(device) for field in self))

    def validate(self, batch_size: int, num_classes: int) -> None:
        """Raise a ValueError if an image index or a label is out of range. Synchronises."""
        names = "targets.image_index", "targets.labels"
        batch_size, num_classes = _checks.whole("batch_size", batch_size, 0), _checks.whole("num_classes", num_classes)
        _checks.rows_in_range(self.image_index.cpu(), self.labels.cpu(), batch_size, num_classes, names)

    def is_valid(self, batch_size: int, num_classes: int) -> Tensor:
        """Which rows (N,) count as ground truth."""
        return is_valid(*self, batch_size, num_classes)

    @classmethod
    def _from_boxes(cls, image_index: Tensor, labels: Tensor, boxes: Tensor, box_format: str) -> "Targets":
        make = cls._from_xyxy if box_format == "xyxy" else cls._from_xywh
        return make(image_index, labels, boxes)

    @classmethod
    def _from_xywh(cls, image_index: Tensor, labels: Tensor, boxes: Tensor) -> "Targets":
        centre, size, *_ = boxes.split(2, -1)
        return cls(*_whole(image_index, labels), torch.cat([centre - size / 2, centre + size / 2], -1), boxes)

    @classmethod
    def _from_xyxy(cls, image_index: Tensor, labels: Tensor, boxes: Tensor) -> "Targets":
        low, high = boxes.split(2, -1)
        return cls(*_whole(image_index, labels), boxes, torch.cat([(low + high) / 2, high - low], -1))


def _whole(image_index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both as int64; a label that is no whole number makes its row padding."""
    whole = labels.long()
    if labels.is_floating_point():
        image_index = torch.where(whole == labels, image_index, -1)
    return image_index, whole


def _check_values(labels_name: str, boxes_name: str, labels: Tensor, boxes: Tensor, is_box: Tensor, box_format: str) -> None:
    """Look at the values of ground truth on the CPU, but for a graph."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or type(labels) is not Tensor:
        return
    _checks.whole_values(labels_name, "labels", labels[is_box])
    _checks.pixel_boxes(boxes_name, boxes[is_box & _has_sides(boxes, box_format)][:, :4])


def _size(box_format: str) -> int:
    """Numbers of a box."""
    return 5 if box_format == "xywhr" else 4


def _has_sides(boxes: Tensor, box_format: str) -> Tensor:
    """Which boxes (..., 4 or 5) have positive sides."""
    first, second, *_ = boxes.split(2, -1)
    return (second > (first if box_format == "xyxy" else 0.0)).all(-1)
