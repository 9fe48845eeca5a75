"""The mask term of instance segmentation, for any assignment."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _ops
from ._precision import widened, working
from ._rows import is_matched
from ._signatures import ImageSize, MaskLoss, wider
from .targets import Targets

_LONGEST_SIDE = 2**16 - 1


def mask_loss(
    pred_masks: Tensor,
    prototypes: Tensor,
    target_row: Tensor,
    targets: Targets,
    masks: Tensor,
    *,
    imgsz: float | tuple[float, float],
    overlap_mask: bool = True,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Compute the mask term of YOLACT (arXiv 1904.02689), as YOLOv8-seg and YOLO11-seg have it, of a given assignment.

    The logits of a positive's mask are its coefficients times the prototypes. Their cross entropy with the mask of its target
    is summed over the pixels of the target's box, those with an index of at least x1 and below x2, and divided by the box's
    area in pixels of the mask. The term is the sum over the positives by their number. Nothing has an entry for every positive
    and pixel: memory grows with the prototypes and with the positives.

    Everything is computed in float32 (in float64 if an input is float64). A logit inside a box that is NaN or infinite makes
    the loss and every gradient NaN; other coefficients and prototypes are not looked at.

    Args:
        pred_masks: (B, A, M) coefficients of every anchor, any strides: pass channel-first as ``x.transpose(1, 2)``.
        prototypes: (B, M, h, w), any strides. Where masks have another size they are resized to it, bilinearly.
        target_row: (B, A) int32 or int64, the row of ``targets`` that every anchor is matched with, -1 for background. The row
            is one of the anchor's image.
        targets: N rows of ground truth in pixels of the image; labels have no part in this.
        masks: of any type. (B, H, W) images in which a pixel holds the number of the object that it belongs to: the place of
            its row among the rows of its image in ``targets``, whether they count or not, from 1; 0 for none. Without
            ``overlap_mask`` (N, H, W), a mask a row of 0 and 1, or of probabilities.
        imgsz: (height, width) of the image in pixels, or one number for both; masks show all of it.
        overlap_mask: which of the two ``masks`` are.
        normaliser: () number that the sum is divided by, as it is; by default that of the positives, at least 1.

    Returns:
        (), 0 without a positive.

    Raises:
        ValueError: sizes or devices do not agree; on the CPU also for a row that there is not, that has another image or no
            box (elsewhere its anchor is background).
        TypeError: a type is wrong.

    Example:
        >>> pred_masks, prototypes = torch.ones(1, 4, 2, requires_grad=True), torch.ones(1, 2, 8, 8, requires_grad=True)
        >>> boxes = torch.tensor([[8.0, 8, 40, 24]])  # 8 by 4 pixels of the prototypes
        >>> targets = ty.Targets.from_list([{"boxes": boxes, "labels": torch.tensor([0])}])
        >>> masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> masks[0, 2:6, 2:6] = 1
        >>> loss = ty.mask_loss(pred_masks, prototypes, torch.tensor([[-1, 0, -1, -1]]), targets, masks, imgsz=32)
        >>> loss.backward()
    """
    _checks.tensor("pred_masks", pred_masks, ("B", "A", "M"))
    batch_size, _, num_channels = pred_masks.shape
    _checks.tensor("prototypes", prototypes, (batch_size, num_channels, "h", "w"), like=pred_masks)
    _checks.ground_truth(targets, Targets._fields, pred_masks)
    _checks.target_row("target_row", target_row, pred_masks)
    size, overlap_mask = _checks.image_size("imgsz", imgsz), _checks.boolean("overlap_mask", overlap_mask)
    image_index, no_label = targets.image_index, torch.zeros_like(targets.labels)
    is_row = targets._replace(labels=no_label).is_valid(batch_size, 1)
    is_fg = is_matched(target_row, image_index.where(is_row, -1), no_label, 1)
    _checks.matched_rows("target_row", target_row, is_fg)
    if normaliser is None:
        normaliser = is_fg.sum().clamp(min=1)
    else:
        _checks.tensor("normaliser", normaliser, (), like=pred_masks)
    scale = 1 / normaliser.detach().to(wider(pred_masks, prototypes))
    row = target_row.where(is_fg, -1).int()
    return term_of_rows(pred_masks, prototypes, row, targets, masks, scale, size, overlap_mask=overlap_mask)


def term_of_rows(
    pred_masks: Tensor, prototypes: Tensor, target_row: Tensor, targets: Targets, masks: Tensor, scale: Tensor,
    imgsz: ImageSize, *, overlap_mask: bool,
) -> Tensor:  # fmt: skip
    """The sum over positives, times ``scale`` (), of checked predictions and an assignment that only has rows which count."""
    num_masks = pred_masks.shape[0] if overlap_mask else targets.labels.shape[0]
    _checks.tensor("masks", masks, (num_masks, "H", "W"), like=pred_masks, is_float=False)
    height, width = masks.shape[1:]
    if not (0 < height <= _LONGEST_SIDE and 0 < width <= _LONGEST_SIDE):
        raise ValueError(f"masks must have sides of 1 to {_LONGEST_SIDE} pixels, got {tuple(masks.shape)}")
    if prototypes.shape[2:] != (height, width):
        if 0 in prototypes.shape[2:]:
            raise ValueError(f"prototypes must have pixels, got {tuple(prototypes.shape)}")
        prototypes = F.interpolate(working(prototypes), (height, width), mode="bilinear")
    pred_masks, prototypes = widened(pred_masks, prototypes)
    masks = masks.detach()
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    boxes = targets.boxes_xyxy.to(scale.dtype).contiguous()
    wants_grad = torch.is_grad_enabled() and (pred_masks.requires_grad or prototypes.requires_grad)
    options = boxes, masks, numbers_in_images(targets.image_index), scale, imgsz, overlap_mask, wants_grad
    return _ops.mask_loss(MaskLoss(pred_masks, prototypes, target_row.contiguous(), *options)).loss


def numbers_in_images(image_index: Tensor) -> Tensor:
    """The place (N,) of every row among those of its image, from 1."""
    ordered, order = image_index.sort(stable=True)
    places = torch.arange(1, order.shape[0] + 1, device=order.device) - torch.searchsorted(ordered, ordered)
    return places.gather(0, order.argsort())
