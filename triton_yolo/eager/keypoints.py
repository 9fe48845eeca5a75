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
    if pos.logits is not None:
        kobj = F.binary_cross_entropy_with_logits(pos.logits, pos.visible, reduction="sum") / len(x.sigmas)
    other = x.other_loss.to(pose.dtype)
    is_right = is_finite(pos.raw) & ~other.isnan()
    terms = [(total / pos.num_fg).where(is_right, torch.nan) for total in (pose_gain * pose, kobj_gain * kobj)]
    loss = other + pos.num_images * torch.stack(terms).sum()
    if not x.wants_grad:
        return KeypointLossOutputs._make((loss, *terms, x.pred_keypoints.new_empty(0), loss.new_empty(0)))
    return KeypointLossOutputs._make((loss, *terms, *_keypoint_gradients(x, pos, loss)))


def _keypoint_gradients(x: KeypointLoss, pos: "_Positives", loss: Tensor) -> tuple[Tensor, Tensor]:
    out = x.allocate()
    if loss.isnan():
        return out.grad_pred_keypoints.fill_(torch.nan), out.grad_other_loss.fill_(torch.nan)
    pose_gain, kobj_gain = x.gains
    numbers = list(pose_gain * pos.per_sum * pos.slopes())
    if pos.logits is not None:
        numbers.append((pos.logits.sigmoid() - pos.visible) * (kobj_gain / len(x.sigmas) * pos.per_sum))
    grad = untouched_zeros_like(out.grad_pred_keypoints)
    grad[pos.images, pos.anchors] = torch.stack(numbers, -1).flatten(1).to(grad.dtype)
    return grad, torch.ones_like(out.grad_other_loss)


class _Positives:
    """The positive anchors (M), raw keypoints (M, K * D), and how far they are off in cells (2, M, K), 0 where unseen."""

    def __init__(self, x: KeypointLoss) -> None:
        points, point_strides = anchor_table(x.levels, x.pred_keypoints)
        self.images, self.anchors = (x.target_row >= 0).nonzero().unbind(-1)
        rows = x.target_row[self.images, self.anchors].long()
        stride, truth = point_strides[self.anchors], _Truth(x, points.dtype)
        self.raw = working(x.pred_keypoints[self.images, self.anchors])
        numbers = self.raw.unflatten(1, (len(x.sigmas), x.num_dims)).permute(2, 0, 1).contiguous()
        self.logits = numbers[2] if x.num_dims == 3 else None
        self.visible, self.share = truth.visible[rows], truth.share[rows]
        corner = (points[:, self.anchors] - 0.5)[..., None]
        self.offset = numbers[:2].mul(2).add_(corner).sub_(truth.places[:, rows] / stride[:, None])
        self.offset = self.offset.where(self.visible > 0, 0)
        variances = torch.tensor([(2 * sigma) ** 2 * 2 for sigma in x.sigmas], dtype=points.dtype, device=points.device)
        self.per_square = 1 / variances / (truth.area[rows] / stride.square() + 1e-9)[:, None]
        self.error = self.offset.square().sum(0) * self.per_square
        num_images = len(x.pred_keypoints) if x.num_images is None else x.num_images
        self.num_images = torch.as_tensor(num_images, dtype=points.dtype, device=points.device)
        self.num_fg = x.num_fg.to(points.dtype)
        self.num_fg = self.num_fg.where(self.num_fg > 0, 1)
        self.per_sum = self.num_images / self.num_fg

    def distances(self) -> Tensor:
        """1 - OKS of every keypoint by its share (M, K)."""
        return torch.expm1(-self.error).mul_(-self.share)

    def slopes(self) -> Tensor:
        """Its derivative by the raw places (2, M, K), which are half as far apart; 0 wherever it is flat."""
        similarity = (-self.error).exp_()
        return (4 * self.share * self.per_square * similarity * self.offset).where(similarity > 0, 0)


class _Truth:
    """Of the rows: keypoints (2, N, K) and area (N,) in pixels, which are visible and their share in the mean (N, K)."""

    def __init__(self, x: KeypointLoss, dtype: torch.dtype) -> None:
        numbers, sizes = x.gt_keypoints.to(dtype), x.gt_sizes.to(dtype)
        visible = numbers.isfinite().all(-1)
        if numbers.shape[2] == 3:
            visible &= numbers[..., 2] != 0
        height, width = x.levels.image_size if x.is_normalised else (1.0, 1.0)
        self.places = torch.stack([numbers[..., 0] * width, numbers[..., 1] * height])
        self.area = sizes[:, 0] * width * (sizes[:, 1] * height)
        self.visible = visible.to(dtype)
        self.share = self.visible / self.visible.sum(1, keepdim=True).clamp(min=1)
