"""From what a head puts out to boxes."""

import torch
from torch import Tensor

from .._precision import working
from .._signatures import Boxes, DecodeDFL, DecodeDFLBackward, DecodeYOLOX, DecodeYOLOXBackward, GradDist, GradPreds


def expectation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (..., R) and expected bin (...) of logits (..., R). With one bin the logit is the value."""
    if logits.shape[-1] == 1:
        return torch.ones_like(logits), logits.squeeze(-1)
    probs = logits.softmax(-1)
    return probs, probs @ torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)


def expectation_backward(grad: Tensor, probs: Tensor, value: Tensor) -> Tensor:
    """Gradient of the logits (..., R) from that of the expected bin (...)."""
    if probs.shape[-1] == 1:
        return grad[..., None]
    bins = torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    return (probs * (bins - value[..., None])).mul_(grad[..., None])


def boxes_from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4) at ``points`` (..., 2) from (left, top, right, bottom)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def distances_grad(grad_boxes: Tensor) -> Tensor:
    """Gradient of (left, top, right, bottom) from that of the box."""
    return torch.cat([-grad_boxes[..., :2], grad_boxes[..., 2:]], -1)


def decode_dfl(x: DecodeDFL) -> Boxes:
    _, distances = expectation(working(x.pred_dist).unflatten(-1, (4, x.reg_max)))
    boxes = boxes_from_distances(x.anchor_points.to(distances.dtype), distances)
    return Boxes(boxes if x.strides is None else boxes * x.strides.to(boxes.dtype)[:, None])


def decode_dfl_backward(x: DecodeDFLBackward) -> GradDist:
    grad = distances_grad(x.grad if x.strides is None else x.grad * x.strides.to(x.grad.dtype)[:, None])
    result = torch.empty_like(x.pred_dist)
    bins = torch.arange(x.reg_max, dtype=grad.dtype, device=grad.device)
    for image, dist in enumerate(x.pred_dist):  # a part that stays in the processor's cache
        logits = working(dist.T).unflatten(0, (4, x.reg_max))
        grad_logits = grad[image].T.unsqueeze(1)
        if x.reg_max > 1:
            probs = logits.softmax(1)
            grad_logits = (bins[:, None] - (bins @ probs).unsqueeze(1)).mul_(probs).mul_(grad_logits)
        result[image].T.unflatten(0, (4, x.reg_max)).copy_(grad_logits)
    return GradDist(result)


def decode_yolox(x: DecodeYOLOX) -> Boxes:
    return Boxes(boxes_from_raw(x.preds, x.anchor_points, x.strides))


def boxes_from_raw(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    raw = working(preds)
    stride = strides.to(raw.dtype)[:, None]
    centre = (anchor_points.to(raw.dtype) - 0.5 + raw[..., :2]) * stride
    size = raw[..., 2:4].exp() * stride
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def decode_yolox_backward(x: DecodeYOLOXBackward) -> GradPreds:
    result = torch.zeros_like(x.preds)
    result[..., :4] = yolox_raw_grad(x.grad, working(x.preds[..., 2:4]), x.strides.to(x.grad.dtype)[:, None])
    return GradPreds(result)


def yolox_raw_grad(grad_boxes: Tensor, raw_size: Tensor, stride: Tensor) -> Tensor:
    """Gradient of (dx, dy, log w, log h) from that of the corners."""
    low, high = grad_boxes[..., :2] * stride, grad_boxes[..., 2:] * stride
    return torch.cat([low + high, (high - low) / 2 * raw_size.exp()], -1)
