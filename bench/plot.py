"""From the saved results: the tables of the README and of docs/benchmarks.md, and plots, of float32 on a CPU."""

import argparse
from pathlib import Path
from typing import Any

from . import results
from .measure import spread
from .tables import PAGES, fill_all, heading_of

_AXES = {
    "batch_size": "images a batch",
    "imgsz": "side of the image, pixels",
    "num_classes": "classes",
    "boxes an image": "boxes in one image",
}
PLOTS = Path(__file__).parent / "plots"


def run(arguments: argparse.Namespace) -> None:
    for page in PAGES:
        page.write_text(fill_all(page.read_text()))
    PLOTS.mkdir(exist_ok=True)
    both = [row for command in ("loss", "stages") for row in results.latest(command) if row.get("least_bytes")]
    for name, rows, draw in (
        ("loss", results.latest("loss"), _draw_bars),
        ("roofline", both, _draw_roofline),
        ("scaling", results.latest("scaling"), _draw_scaling),
    ):
        draw(name, [row for row in rows if (row["device"], row["dtype"]) == ("cpu", "float32")])


def _draw_bars(name: str, rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["forward"]]
    labels = [f"{row['what']}\n{row['name']}" for row in timed]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(timed) + 1), layout="constrained")
    forward = [1e3 * spread(row["forward"])[0] for row in timed]
    backward = [1e3 * spread(row["backward"])[0] for row in timed]
    bars = axes.barh(labels, forward, label="forward")
    if any(b > 0.05 for b in backward):
        bars = axes.barh(labels, backward, left=forward, label="backward")
        axes.legend()
    axes.bar_label(bars, [f"{f + b:.0f} ms" for f, b in zip(forward, backward, strict=True)], padding=3)
    axes.margins(x=0.15)
    axes.set(xlabel="milliseconds", title=heading_of(timed[0]).split(":")[0])
    axes.title.set_fontsize(8)
    axes.invert_yaxis()
    figure.savefig(PLOTS / f"{name}.svg")
    plt.close(figure)


def _draw_roofline(name: str, rows: list[dict[str, Any]]) -> None:
    """Everything here is bound by memory, so the roof is flat: how fast a copy is."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    timed = [row for row in rows if row["forward"]]
    whats = list(dict.fromkeys(row["what"] for row in timed))
    for implementation in dict.fromkeys(row["name"] for row in timed):
        points = [(whats.index(r["what"]), _speed(r) / 1e9) for r in timed if r["name"] == implementation]
        axes.plot(*zip(*points, strict=True), "o", label=implementation)
    axes.axhline(timed[0]["copy_bandwidth"] / 1e9, color="gray", linestyle="--", label="a copy")
    axes.set_xticks(range(len(whats)), whats, rotation=25, ha="right", fontsize=8)
    axes.set(yscale="log", ylabel="GB/s of the fewest bytes, forward + backward", title=heading_of(timed[0]))
    axes.title.set_fontsize(8)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(PLOTS / f"{name}.svg")
    plt.close(figure)


def _speed(row: dict[str, Any]) -> float:
    return row["least_bytes"] / spread([f + b for f, b in zip(row["forward"], row["backward"], strict=True)])[0]


def _draw_scaling(name: str, rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, grid = plt.subplots(1, len(sizes), figsize=(3.2 * len(sizes), 3), layout="constrained", squeeze=False)
    for axes, size in zip(grid[0], sizes, strict=True):
        for system in dict.fromkeys(row["what"] for row in rows):
            points = [(r["value"], 1e3 * spread(r["seconds"])[0]) for r in rows if (r["what"], r["size"]) == (system, size)]
            axes.plot(*zip(*points, strict=True), marker="o", label=system)
        values = sorted({row["value"] for row in rows if row["size"] == size})
        axes.set(xlabel=_AXES[size], yscale="log")
        axes.set_xscale("symlog" if 0 in values else "log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        if 0 in values:
            axes.set_xlim(left=-0.5)
    grid[0][0].set_ylabel("milliseconds, forward + backward")
    for axes in grid[0]:
        axes.legend()
    figure.savefig(PLOTS / f"{name}.svg")
    plt.close(figure)
