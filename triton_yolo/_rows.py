"""Which rows count as ground truth."""

from torch import Tensor


def is_valid(image_index: Tensor, labels: Tensor, boxes_xyxy: Tensor, batch_size: int, num_classes: int) -> Tensor:
    """Whether rows (N,) have an image of the batch, a class, finite corners and positive, finite sides."""
    low, high = boxes_xyxy.split(2, -1)
    sides = high - low
    in_batch = (image_index >= 0) & (image_index < batch_size)
    is_class = (labels >= 0) & (labels < num_classes)
    is_box = boxes_xyxy.isfinite().all(-1) & (sides.isfinite() & (sides > 0)).all(-1)
    return in_batch & is_class & is_box
