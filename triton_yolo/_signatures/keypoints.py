"""Keypoints of positive anchors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from .common import Levels, held_gradient


class KeypointLossOutputs(NamedTuple):
    """The loss (); its weighted terms, () each; gradients, without elements if unwanted."""

    loss: Tensor
    pose: Tensor
    kobj: Tensor
    grad_pred_keypoints: Tensor
    grad_other_loss: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return self[1:3]


class KeypointLoss(NamedTuple):
    """Raw keypoints (B, A, K * D), D 2 or 3, of a given assignment, added to a loss () of other terms.

    ``target_row`` (B, A) int32 is a row of ``gt_keypoints`` (N, K, 2 or 3) and of ``gt_sizes`` (N, 2), width and height of the
    boxes: in shares of the image if ``is_normalised``, else in pixels. The terms are divided by ``num_fg`` () as it is, by 1
    if it is 0, and their sum is multiplied by ``num_images`` (), by B if there is none.
    """

    pred_keypoints: Tensor
    other_loss: Tensor
    target_row: Tensor
    num_fg: Tensor
    num_images: Tensor | None
    gt_keypoints: Tensor
    gt_sizes: Tensor
    is_normalised: bool
    levels: Levels
    sigmas: tuple[float, ...]
    gains: tuple[float, ...]
    wants_grad: bool

    @property
    def num_dims(self) -> int:
        """Numbers a predicted keypoint."""
        return self.pred_keypoints.shape[2] // len(self.sigmas)

    def allocate(self) -> KeypointLossOutputs:
        preds, dtype = self.pred_keypoints, working_dtype(self.pred_keypoints.dtype)
        loss = preds.new_empty((), dtype=dtype)
        terms = loss.new_empty(()), loss.new_empty(())
        if not self.wants_grad:
            return KeypointLossOutputs(loss, *terms, preds.new_empty(0), loss.new_empty(0))
        return KeypointLossOutputs(loss, *terms, held_gradient(preds), torch.empty_like(self.other_loss))
