"""What the pictures of upright boxes share: an assignment on composed boxes, and how it is drawn."""

from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

import triton_yolo as ty

SIDE, STRIDES = 256, (8, 16, 32)
MARKERS = dict(zip(STRIDES, "osD", strict=True))
INK = "0.2"


class Assignment(NamedTuple):
    """Places (A, 2) of the anchors in pixels, their strides (A,), the box (A,) that each has, -1 for none, and its score."""

    points: Tensor
    strides: Tensor
    row: Tensor
    score: Tensor


def assign(boxes: Tensor) -> Assignment:
    """To boxes (n, 4) xyxy, as if every anchor predicted the nearest one, the better the nearer it is."""
    points, strides = ty.make_anchors([(SIDE // stride,) * 2 for stride in STRIDES], STRIDES)
    points = points * strides[:, None]
    distance, nearest = torch.cdist(points, (boxes[:, :2] + boxes[:, 2:]) / 2).min(1)
    predicted = boxes[nearest] + (1 + distance[:, None] / 12) * torch.randn(len(points), 4)
    scores, labels, mask = torch.full((1, len(points), 1), 0.5), torch.zeros(1, len(boxes)), torch.ones(1, len(boxes))
    assigner = ty.TaskAlignedAssigner(topk=10, num_classes=1, alpha=0.5)
    found = assigner(scores, predicted[None], points, labels, boxes[None], mask)
    row = found.target_gt_idx[0].where(found.fg_mask[0], -1)
    return Assignment(points, strides, row, found.target_scores[0].amax(1))


def draw_assignment(axes: Axes, boxes: Tensor, found: Assignment) -> None:
    """Boxes and the anchors that each was assigned, in its colour."""
    axes.scatter(*found.points.T, s=1, color="0.8", zorder=1)
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=f"C{number}", linewidth=1.5))
        for stride, marker in MARKERS.items():
            own = (found.row == number) & (found.strides == stride)
            sizes = 8 + 40 * found.score[own]
            axes.scatter(
                *found.points[own].T, s=sizes, color=f"C{number}", marker=marker, edgecolors="white", linewidths=0.7, zorder=3
            )
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal", xticks=[], yticks=[])


def legend_of(found: Assignment) -> list[Line2D]:
    """One marker a stride that was assigned."""
    used = found.strides[found.row >= 0].unique().int().tolist()
    style = {"linestyle": "", "color": INK, "markersize": 7}
    return [Line2D([], [], marker=MARKERS[stride], label=f"anchor of stride {stride}", **style) for stride in used]
