"""The mask term of instance segmentation."""

from typing import NamedTuple

from torch import Tensor

from .common import ImageSize, held_gradient, wider


class MaskLossOutputs(NamedTuple):
    """The loss (); gradients, without elements if unwanted."""

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
    imgsz: ImageSize
    overlap_mask: bool
    wants_grad: bool

    def allocate(self) -> MaskLossOutputs:
        like = self.coefficients, self.prototypes
        grads = [held_gradient(x) if self.wants_grad else x.new_empty(0) for x in like]
        return MaskLossOutputs(self.coefficients.new_empty((), dtype=wider(*like)), *grads)

    @property
    def pixels_a_px(self) -> tuple[float, float]:
        """Pixels of a mask in one of the image, along x and y."""
        (height, width), (image_height, image_width) = self.prototypes.shape[2:], self.imgsz.pixels
        return width / image_width, height / image_height
