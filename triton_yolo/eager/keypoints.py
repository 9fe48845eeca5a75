"""Object keypoint similarity and visibility of the positives, with the gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import working
from .._signatures import KeypointLoss, KeypointLossOutputs
from .finite import is_finite
from .memory import untouched_zeros_like
from .pairs import anchor_table


def keypoint_loss(x: KeypointLoss) -> KeypointLossOutputs:
    pos = _Positives(x)
    pose_gain, kobj_gain = x.gains
    pose, kobj = pos.distances().sum(), torch.zeros_like(pos.per_sum)
    if pos.has_flags:
        kobj = F.binary_cross_entropy_with_logits(pos.raw[..., 2], pos.visible, reduction="sum") / len(x.sigmas)
    terms = torch.stack([pose_gain * pose, kobj_gain * kobj]) / pos.num_fg
    other = x.other_loss.to(terms.dtype)
    terms = terms.where(is_finite(pos.raw) & ~other.isnan(), torch.nan)
    loss = other + pos.num_images * terms.sum()
    if not x.wants_grad:
        return KeypointLossOutputs(loss, terms, x.pred_keypoints.new_empty(0), loss.new_empty(0))
    return KeypointLossOutputs(loss, terms, *_gradients(x, pos, loss))


def _gradients(x: KeypointLoss, pos: "_Positives", loss: Tensor) -> tuple[Tensor, Tensor]:
    out = x.allocate()
    if loss.isnan():
        return out.grad_pred_keypoints.fill_(torch.nan), out.grad_other_loss.fill_(torch.nan)
    pose_gain, kobj_gain = x.gains
    grads = [pose_gain * pos.per_sum * pos.slopes()]
    if pos.has_flags:
        error = pos.raw[..., 2].sigmoid() - pos.visible
        grads.append((kobj_gain / len(x.sigmas) * pos.per_sum * error)[..., None])
    grad = untouched_zeros_like(out.grad_pred_keypoints)
    grad[pos.images, pos.anchors] = torch.cat(grads, -1).flatten(1).to(grad.dtype)
    return grad, torch.ones_like(out.grad_other_loss)


class _Positives:
    """The positive anchors (M), raw keypoints (M, K, D), and how far they are off in cells (M, K, 2) where visible (M, K)."""

    def __init__(self, x: KeypointLoss) -> None:
        points, point_strides = anchor_table(x.levels, x.pred_keypoints)
        self.images, self.anchors = (x.target_row >= 0).nonzero().unbind(-1)
        rows = x.target_row[self.images, self.anchors].long()
        self.raw = working(x.pred_keypoints[self.images, self.anchors]).unflatten(-1, (len(x.sigmas), x.num_dims))
        self.has_flags = x.num_dims == 3
        stride, target = point_strides[self.anchors], x.gt_keypoints[rows].to(self.raw.dtype)
        visible = target.isfinite().all(-1)
        if target.shape[-1] == 3:
            visible &= target[..., 2] != 0
        self.visible = visible.to(self.raw.dtype)
        height, width = x.levels.image_size if x.is_normalised else (1.0, 1.0)
        place = target[..., :2] * target.new_tensor([width, height]) / stride[:, None, None]
        self.offset = (2 * self.raw[..., :2] + (points.T[self.anchors] - 0.5)[:, None] - place).where(visible[..., None], 0)
        boxes = x.gt_boxes[rows].to(self.raw.dtype)
        area = ((boxes[:, 2:] - boxes[:, :2]) / stride[:, None]).prod(-1) + 1e-9
        variances = torch.tensor([(2 * sigma) ** 2 * 2 for sigma in x.sigmas], dtype=area.dtype, device=area.device)
        self.per_square = 1 / (variances * area[:, None])
        self.error = self.offset.square().sum(-1) * self.per_square
        self.share = self.visible / self.visible.sum(1, keepdim=True).clamp(min=1)
        num_images = len(x.pred_keypoints) if x.num_images is None else x.num_images
        self.num_fg = x.num_fg.to(area.dtype)
        self.num_fg = self.num_fg.where(self.num_fg > 0, 1)
        self.num_images = torch.as_tensor(num_images, dtype=area.dtype, device=area.device)
        self.per_sum = self.num_images / self.num_fg

    def distances(self) -> Tensor:
        """1 - OKS (M,)."""
        return -(torch.expm1(-self.error) * self.share).sum(1)

    def slopes(self) -> Tensor:
        """Its derivative by the raw places (M, K, 2), which are half as far apart; 0 wherever it is flat."""
        similarity = (-self.error).exp()[..., None]
        slope = 4 * (self.share * self.per_square)[..., None] * similarity * self.offset
        return slope.where(similarity > 0, 0)
