"""From the saved results: bar charts, scaling curves, and the tables of the README between their markers."""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import results, train_step
from .compare import HEADER, markdown
from .measure import spread
from .traffic import BARS

ROOT = Path(__file__).resolve().parents[1]
_AXES = {
    "batch_size": "images a batch",
    "imgsz": "side of the image, pixels",
    "num_classes": "classes",
    "boxes an image": "boxes in one image",
}
README, PLOTS = ROOT / "README.md", Path(__file__).parent / "plots"


def run(arguments: argparse.Namespace) -> None:
    text = README.read_text()
    for command in ("loss", "stages", "assign"):
        rows = results.latest(command)
        if rows:
            text = fill(text, command, table(rows))
            _draw_bars(command, rows)
    if rows := results.latest("train-step"):
        text = fill(text, "train-step", table(rows, train_step.HEADER, train_step.markdown))
    README.write_text(fill(text, "traffic", traffic_table()))
    if rows := results.latest("scaling"):
        _draw_scaling(rows)


def fill(text: str, command: str, table: str) -> str:
    """Put a table between the markers of a command, where a text has them."""
    start, end = f"<!-- bench {command} -->", f"<!-- end of bench {command} -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def table(rows: Iterable[dict[str, Any]], header: str = HEADER, line: Callable[[dict[str, Any]], str] = markdown) -> str:
    """What was measured where, and the rows, for every machine and size."""
    lines: list[str] = []
    heading = None
    for row in rows:
        if (found := _heading(row)) != heading:
            heading = found
            lines += ["", heading, "", header] if lines else [heading, "", header]
        lines.append(line(row))
    return "\n".join(lines)


def traffic_table() -> str:
    """The committed bars, which the tests hold the kernels to."""
    lines = [
        "| kernels of | launches forward + backward | bytes over the least | bytes an anchor beside |",
        "|---|--:|--:|--:|",
    ]
    for name, bar in json.loads(BARS.read_text()).items():
        lines.append(f"| {name} | {bar['forward']} + {bar['backward']} | {bar['ratio']:.3f} | {bar['spare']} |")
    return "\n".join(lines)


def _heading(row: dict[str, Any]) -> str:
    machine = row["machine"]
    device = machine.get("gpu") if row["device"].startswith("cuda") else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}, torch {machine['torch']}, {row['date']}, commit {row['commit']}: {row['dtype']}, B={row['batch_size']}, "
        f"{row['imgsz']} px, C={row['num_classes']}, {row['num_boxes']} boxes ({row['boxes']})."
    )


def _draw_bars(command: str, rows: list[dict[str, Any]]) -> None:
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
    axes.margins(x=0.12)
    axes.set(xlabel="milliseconds", title=_heading(timed[0]).split(":")[0])
    axes.title.set_fontsize(8)
    axes.invert_yaxis()
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{command}.svg")
    plt.close(figure)


def _draw_scaling(rows: list[dict[str, Any]]) -> None:
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
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / "scaling.svg")
    plt.close(figure)
