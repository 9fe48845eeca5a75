"""Draw the picture of docs/oriented-boxes.md: ``python docs/draw_oriented.py docs/oriented.png``."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

import triton_yolo as ty

SIDE, STRIDES = 256, (8, 16, 32)


def scene() -> Tensor:
    """Boxes (n, 5): ships beside each other, two that cross, a square and a small one."""
    harbour = [(40.0 + 22 * i, 60.0 + 9 * i, 90.0, 18.0, -1.1) for i in range(4)]
    others = [(180, 180, 130, 26, 0.5), (180, 180, 120, 22, 2.0), (70, 190, 60, 60, 0.4), (225, 50, 22, 12, 1.0)]
    return torch.tensor([*harbour, *others])


def main(file: Path) -> None:
    torch.manual_seed(0)
    boxes = scene()
    points, strides = ty.make_anchors([(SIDE // stride,) * 2 for stride in STRIDES], STRIDES)
    points = points * strides[:, None]
    # Every anchor predicts the nearest box, if not too well.
    nearest = boxes[torch.cdist(points, boxes[:, :2]).argmin(1)]
    predicted = nearest + torch.randn(len(points), 5) * torch.tensor([3.0, 3.0, 4.0, 3.0, 0.1])
    scores, labels, mask = torch.full((1, len(points), 1), 0.5), torch.zeros(1, len(boxes)), torch.ones(1, len(boxes))
    assigner = ty.RotatedTaskAlignedAssigner(topk=10, num_classes=1, alpha=0.5, min_box_side=16)
    assigned = assigner(scores, predicted[None], points, labels, boxes[None], mask)

    figure, axes = plt.subplots(figsize=(5.5, 6.3), dpi=100, layout="constrained")
    axes.scatter(*points.T, s=1, color="0.8")
    for number, (x, y, width, height, angle) in enumerate(boxes.tolist()):
        colour, corner = f"C{number}", (x - width / 2, y - height / 2)
        turned = Rectangle(corner, width, height, angle=torch.tensor(angle).rad2deg().item(), rotation_point="center")
        turned.set(fill=False, edgecolor=colour, linewidth=1.5)
        axes.add_patch(turned)
        own = assigned.fg_mask[0] & (assigned.target_gt_idx[0] == number)
        axes.scatter(*points[own].T, s=60 * assigned.target_scores[0, own, 0], color=colour)
    axes.set_title("Turned boxes and their assigned anchors", fontsize=11)
    style = {"linestyle": "", "marker": "o", "color": "0.2"}
    handles = [
        Line2D([], [], markersize=(60 * score) ** 0.5, label=f"target score {score}", **style) for score in (0.2, 0.6, 1.0)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal", xticks=[], yticks=[])
    figure.savefig(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
