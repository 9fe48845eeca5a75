"""Draw the picture of docs/keypoints.md: ``python docs/draw_keypoints.py docs/keypoints.png``."""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from drawing import INK, assign, draw_assignment, legend_of
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from torch import Tensor

import triton_yolo as ty

LINES = ((0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), (6, 7), (6, 8))  # head, neck, elbow, hand, ..., hip, feet
SIGMAS = (0.04, 0.04, 0.06, 0.05, 0.06, 0.05, 0.09, 0.07, 0.07)
SHOWN = 1  # the figure whose anchor is looked at


def figure_at(x: float, y: float, size: float, arms: float, lean: float) -> Tensor:
    """Keypoints (K, 2) of a stick figure whose neck is here."""
    reach = [(math.cos(arms) * s, -math.sin(arms)) for s in (1, -1)]
    hands = [(0.22 * s * i, 0.22 * up * i + (0.06 if i == 1 else 0)) for s, up in reach for i in (1, 2)]
    parts = [(0, -0.2), (0, 0), *hands, (lean / 2, 0.42), (lean - 0.16, 0.85), (lean + 0.2, 0.85)]
    return torch.tensor([x, y]) + size * torch.tensor(parts)


def main(file: Path) -> None:
    torch.manual_seed(1)
    people = [figure_at(58, 62, 90, 0.6, 0.0), figure_at(150, 106, 140, -0.5, 0.1), figure_at(222, 44, 62, 0.1, -0.1)]
    people.append(figure_at(52, 190, 60, -1.0, 0.05))
    keypoints = torch.stack([torch.cat([places, torch.full((9, 1), 2.0)], 1) for places in people])
    keypoints[SHOWN, 3, 2] = 0  # a hand behind something
    margin = torch.tensor([6.0, 8.0])
    boxes = torch.stack([torch.cat([p.min(0).values - margin, p.max(0).values + margin]) for p in people])
    found = assign(boxes)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), dpi=100, layout="constrained")
    for number, places in enumerate(people):
        skeleton(left, places, f"C{number}", alpha=0.35, linewidth=3)
    draw_assignment(left, boxes, found)
    left.set_title("Keypoints, boxes, assigned anchors", fontsize=11)

    # One anchor that is nearly right; a foot is not.
    off = torch.tensor([[3, -2], [-3, 3], [6, 4], [12, 16], [-7, 3], [4, 5], [5, -7], [-4, 3], [22, -16]]).float()
    predicted = people[SHOWN] + off
    cell = torch.tensor([9, 7])  # of stride 16: column and row
    raw = ((predicted / 16 - cell) / 2).reshape(1, 1, -1)
    row = torch.full((1, 256), -1)
    row[0, cell[1] * 16 + cell[0]] = SHOWN
    preds = raw.expand(1, 256, -1)
    loss = ty.keypoint_loss(preds, row, keypoints, boxes, [(16, 16)], strides=(16,), sigmas=SIGMAS, pose_gain=1.0)
    area = (boxes[SHOWN, 2:] - boxes[SHOWN, :2]).prod()
    similarity = torch.exp(-off.square().sum(1) / (8 * torch.tensor(SIGMAS).square() * area))
    visible = keypoints[SHOWN, :, 2] > 0
    torch.testing.assert_close(loss.pose, (1 - similarity[visible]).mean())

    right.set_title(f"An orange anchor's prediction: 1 - similarity, mean {loss.pose:.2f}", fontsize=11)
    skeleton(right, people[SHOWN], f"C{SHOWN}", alpha=0.35, linewidth=3)
    for (x, y), (px, py), sigma, s, is_visible in zip(
        people[SHOWN].tolist(), predicted.tolist(), SIGMAS, similarity.tolist(), visible.tolist(), strict=True
    ):  # fmt: skip
        right.scatter(x, y, s=45, color=f"C{SHOWN}" if is_visible else "white", edgecolors=f"C{SHOWN}", zorder=3)
        right.scatter(px, py, s=45, color=INK if is_visible else "0.6", marker="x", zorder=4)
        right.plot([x, px], [y, py], color=INK if is_visible else "0.6", linewidth=1)
        if is_visible:
            radius = sigma * math.sqrt(8 * math.log(2) * area)  # where the similarity is a half
            right.add_patch(Circle((x, y), radius, facecolor="C0", alpha=0.15))
            right.annotate(f"{1 - s:.2f}", (px, py), (6, 3), textcoords="offset points", fontsize=9)
    x1, y1, x2, y2 = boxes[SHOWN].tolist()
    centre = (x1 + x2) / 2
    right.set(xlim=(centre - 90, centre + 90), ylim=(y2 + 22, y1 - 4), aspect="equal", xticks=[], yticks=[])
    handles = [
        *legend_of(found),
        Line2D([], [], linestyle="", marker="o", color=f"C{SHOWN}", markersize=7, label="true keypoint"),
        Line2D(
            [], [], linestyle="", marker="o", color=f"C{SHOWN}", markerfacecolor="white", markersize=7,
            label="not visible: costs nothing",
        ),
        Line2D([], [], linestyle="", marker="x", color=INK, markersize=7, label="predicted, with 1 - similarity"),
        Line2D([], [], linestyle="", marker="o", color="C0", alpha=0.3, markersize=12, label="similarity of a half and more"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)


def skeleton(axes: Axes, places: Tensor, colour: str, **style: float) -> None:
    for a, b in LINES:
        axes.plot(*places[[a, b]].T, color=colour, solid_capstyle="round", zorder=2, **style)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
