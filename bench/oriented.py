"""The criterion of oriented boxes, each implementation on the head's own layout."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import reference
import triton_yolo as ty
from reference.oriented import sides_from

from . import peers
from .cases import STRIDES, Case, distance_logits
from .competitors import MIN_BOX_SIDE, OURS, Step, Target, graphed


class Oriented(NamedTuple):
    """Rows (N, 7), distances (B, 4R, A), angles (B, 1, A) and class logits (B, C, A)."""

    rows: Tensor
    dist: Tensor
    angle: Tensor
    scores: Tensor


@lru_cache(maxsize=2)
def oriented_of(case: Case) -> Oriented:
    """The boxes of the case turned anyhow, and predictions within some 15 % of the box around an anchor that know its class."""
    generator = torch.Generator().manual_seed(1)
    turn = math.pi * (torch.rand(len(case.rows), 1, generator=generator) - 0.25)
    rows = torch.cat([case.rows, turn], 1)
    points, strides = ty.make_anchors(case.feat_shapes, STRIDES)
    num_anchors = len(points)
    distances = torch.empty(case.batch_size, 4, num_anchors).log_normal_(0.5, 0.7, generator=generator)
    angle = math.pi * (torch.rand(case.batch_size, 1, num_anchors, generator=generator) - 0.25)
    logits = torch.randn(case.batch_size, case.num_classes, num_anchors, generator=generator) * 1.5 - 5
    noise = torch.empty_like(distances).log_normal_(0, 0.15, generator=generator)
    for image in range(case.batch_size):
        of_image = rows[rows[:, 0] == image]
        boxes = of_image[:, 2:] * torch.tensor([*[float(case.imgsz)] * 4, 1.0])
        sides = sides_from((points * strides[:, None])[:, None], boxes)
        box = sides.amin(2).argmax(1)
        inside = (sides.amin(2).amax(1) > 0).nonzero().squeeze(1)
        of_box = sides[inside, box[inside]] / strides[inside, None]
        distances[image][:, inside] = of_box.T * noise[image][:, inside]
        angle[image, 0, inside] = boxes[box[inside], 4] + 0.1 * torch.randn(len(inside), generator=generator)
        logits[image, of_image[box[inside], 1].long(), inside] += 4
    return Oriented(rows, distance_logits(distances, case.reg_max, generator), angle, logits)


def _step(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    rows, *preds = oriented_of(case)
    rows, leaves = rows.to(target.device), tuple(map(target.leaf, preds))
    least = 2 * sum(leaf.numel() for leaf in leaves) * target.dtype.itemsize
    return Step(
        lambda: criterion(*(x.transpose(1, 2) for x in leaves), case.feat_shapes, rows).loss, leaves, target.device, least
    )


def _ours(case: Case, target: Target) -> Step:
    return _step(ty.YOLO11OBBLoss(case.num_classes, **_options(case)), case, target)


def _reference(case: Case, target: Target) -> Step:
    return _step(partial(reference.yolo11_obb_loss, **_options(case)), case, target)


def _options(case: Case) -> dict:
    return {"strides": STRIDES, "reg_max": case.reg_max, "min_box_side": MIN_BOX_SIDE}


def _ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-obb.yaml", case.num_classes).to(target.device).init_criterion()
    rows, *preds = oriented_of(case)
    dist, angle, scores = leaves = tuple(map(target.leaf, preds))
    batch, inputs = (
        peers.ultralytics_batch(rows.to(target.device)),
        peers.ultralytics_preds(dist, scores, case.feat_shapes, angle=angle),
    )
    return Step(lambda: criterion(inputs, batch)[0].sum(), leaves, target.device)


ORIENTED: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "yolo11-obb": {
        OURS: _ours,
        "ultralytics": _ultralytics,
        "reference": _reference,
        f"CUDA graph of {OURS}": partial(graphed, _ours),
    }
}
