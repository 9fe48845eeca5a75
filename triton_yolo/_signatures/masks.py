"""The mask term of instance segmentation."""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import wider


class MaskLossOutputs(NamedTuple):
    """The loss (); gradients, without elements if unwanted. That of float16 is float32, so that small numbers stay above 0."""

    loss: Tensor
    grad_coefficients: Tensor
    grad_prototypes: Tensor


class MaskLoss(NamedTuple):
    """Coefficients (B, A, M) and prototypes (B, M, h, w), of the masks' size; row (B, A) int32 of every anchor, -1 for none.

    Boxes (N, 4) are in pixels of the image. Masks are (B, h, w), in which ``mask_number`` (N,) is what a row's pixels hold, or,
    without ``overlap_mask``, (N, h, w). ``scale`` () multiplies the sum over positives.
    """

    coefficients: Tensor
    prototypes: Tensor
    target_row: Tensor
    gt_boxes: Tensor
    masks: Tensor
    mask_number: Tensor
    scale: Tensor
    imgsz: tuple[float, ...]
    overlap_mask: bool
    wants_grad: bool

    def allocate(self) -> MaskLossOutputs:
        like = self.coefficients, self.prototypes
        grads = [_gradient_of(x) if self.wants_grad else x.new_empty(0) for x in like]
        return MaskLossOutputs(self.coefficients.new_empty((), dtype=wider(*like)), *grads)

    @property
    def pixels_a_px(self) -> tuple[float, float]:
        """Pixels of a mask in one of the image, along x and y."""
        height, width = self.prototypes.shape[2:]
        return width / self.imgsz[1], height / self.imgsz[0]


def _gradient_of(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
