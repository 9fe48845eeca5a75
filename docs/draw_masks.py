"""Draw the picture of docs/masks.md: ``python docs/draw_masks.py docs/masks.png``."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from drawing import INK, SIDE, assign, draw_assignment, legend_of
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

import triton_yolo as ty

PX = 4  # of the image in one of a mask
SHOWN = 1  # the row whose anchor is looked at


def scene() -> Tensor:
    """Masks (n, h, w) of whole shapes: a ring, a star, a disc in front of the star, and a bar."""
    y, x = torch.meshgrid(*[torch.arange(SIDE // PX) * PX + PX / 2] * 2, indexing="ij")

    def polar(cx: float, cy: float) -> tuple[Tensor, Tensor]:
        return torch.hypot(x - cx, y - cy), torch.atan2(y - cy, x - cx)

    ring, (distance, angle) = polar(66, 62)[0], polar(118, 156)
    bar = ((x - 208) * 0.8 + (y - 70) * 0.6).abs(), ((y - 70) * 0.8 - (x - 208) * 0.6).abs()
    star = distance < 56 + 24 * torch.cos(5 * (angle + torch.pi / 2))
    return torch.stack([(ring - 36).abs() < 13, star, polar(186, 186)[0] < 40, (bar[0] < 15) & (bar[1] < 52)])


def main(file: Path) -> None:
    torch.manual_seed(2)
    whole = scene()
    boxes = torch.stack([box_of(mask) for mask in whole])
    numbers = torch.zeros(whole.shape[1:], dtype=torch.uint8)
    for number, mask in enumerate(whole):
        numbers[mask] = number + 1
    found = assign(boxes)

    # Prototypes are blurred shapes; an anchor's coefficients are its own shape's and a little of others'.
    blurred = F.avg_pool2d(F.avg_pool2d(whole.float()[None], 7, 1, 3), 7, 1, 3)
    prototypes = (9 * blurred - 4.5).roll((1, -2), (2, 3))
    coefficients = torch.eye(len(whole))[SHOWN] + torch.tensor([0.1, 0.0, -0.35, 0.1])
    logits = (coefficients[:, None, None] * prototypes[0]).sum(0)
    targets = ty.Targets.from_list([{"boxes": boxes, "labels": torch.zeros(len(boxes))}])
    row = torch.tensor([[SHOWN]])
    loss = ty.mask_loss(coefficients[None, None], prototypes, row, targets, numbers[None], imgsz=SIDE)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.5), dpi=100, layout="constrained")
    colours = ListedColormap(["white", *[tuple(0.55 + 0.45 * c for c in to_rgb(f"C{i}")) for i in range(len(whole))]])
    whole_image = {"extent": (0, SIDE, SIDE, 0), "interpolation": "nearest"}
    left.imshow(numbers, cmap=colours, vmin=0, vmax=len(whole), **whole_image)
    draw_assignment(left, boxes, found)
    left.set_title("Masks, boxes, assigned anchors", fontsize=11)

    true = (numbers == SHOWN + 1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, true, reduction="none")
    middle.set_title("A star anchor's prediction", fontsize=11)
    right.set_title(f"Its cross entropy: {loss:.2f} a pixel", fontsize=11)
    for axes, values, kind, most in ((middle, logits.sigmoid(), "Blues", 1.0), (right, entropy, "Reds", 3.0)):
        image = axes.imshow(values, cmap=kind, vmin=0, vmax=most, **whole_image)
        figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, most / 2, most])
        veil_outside(axes, boxes[SHOWN])
        axes.contour(*[torch.arange(SIDE // PX) * PX + PX / 2] * 2, true, [0.5], colors=INK, linewidths=1.2)
        x1, y1, x2, y2 = boxes[SHOWN].tolist()
        axes.set(xticks=[], yticks=[], xlim=(x1 - 3 * PX, x2 + 3 * PX), ylim=(y2 + 3 * PX, y1 - 3 * PX))
    handles = [
        *legend_of(found),
        Line2D([], [], color=f"C{SHOWN}", label="box of the star"), Line2D([], [], color=INK, label="its true mask"),
        Rectangle((0, 0), 1, 1, color="0.88", label="outside: not counted"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)


def box_of(mask: Tensor) -> Tensor:
    y, x = mask.nonzero().unbind(1)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float() * PX


def veil_outside(axes: Axes, box: Tensor) -> None:
    x1, y1, x2, y2 = box.tolist()
    for x, y, width, height in (
        (0, 0, SIDE, y1), (0, y2, SIDE, SIDE - y2), (0, y1, x1, y2 - y1), (x2, y1, SIDE - x2, y2 - y1)
    ):  # fmt: skip
        axes.add_patch(Rectangle((x, y), width, height, color="0.88", linewidth=0))
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=f"C{SHOWN}", linewidth=1.5))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
