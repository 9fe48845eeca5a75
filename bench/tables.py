"""The tables of the README and of docs/benchmarks.md, from the saved results."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import results, train_step, training
from .compare import HEADER, markdown, milliseconds
from .competitors import OURS
from .measure import spread

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PEERS = ("ultralytics", "pixeltable-yolox", "libreyolo")
SAME = ("run", "machine", "what", "dtype", "batch_size", "boxes")
NAMES = {"yolo11": "`YOLO11Loss`", "yolox": "`YOLOXLoss`"}
Row = dict[str, Any]
Line = Callable[[Row], str]


def fill_all(text: str) -> str:
    """Put every table that there are results for between its markers."""
    for command in ("loss", "stages", "assign", "tasks"):
        text = fill(text, command, table(results.latest(command), HEADER, markdown))
    for command, module in (("train-step", train_step), ("training", training)):
        text = fill(text, command, table(results.latest(command), module.HEADER, module.markdown))
    return fill(text, "summary", summary(sorted(results.latest("loss"), key=lambda row: row["run"])))


def fill(text: str, command: str, table: str) -> str:
    """Put a table between the markers of a command, where a text has them and there is a table."""
    if not table:
        return text
    start, end = f"<!-- bench {command} -->", f"<!-- end of bench {command} -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def summary(rows: list[Row]) -> str:
    """The newest rows of the criteria beside other projects', where both were timed on the same numbers."""
    lines = [
        "| criterion | measured on, commit | beside | its ms | our ms, as a CUDA graph | times faster | times less memory |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    newest: dict[tuple[Any, ...], list[str]] = {}
    for ours, other, graph in _pairs(rows):
        what = f"{NAMES[ours['what']]}, B={ours['batch_size']}, {ours['dtype']}"
        where = f"{_device(ours)}, {ours['date']}, {ours['commit']}"
        times = ", ".join(milliseconds(_total(row)) for row in (ours, graph) if row)
        ratios = [f"{other[ratio]:.1f}" for ratio in ("x_time", "x_memory")]
        cells = [what, where, other["name"], milliseconds(_total(other)), times, *ratios]
        newest[ours["what"], ours["batch_size"], _device(ours), _project(other)] = cells  # rows come oldest first
    lines += [f"| {' | '.join(cells)} |" for cells in newest.values()]
    return "\n".join(lines) if newest else ""


def _pairs(rows: list[Row]) -> Iterator[tuple[Row, Row, Row | None]]:
    """Our row, that of another project, timed in one run on the same numbers, and ours as a CUDA graph if there is one."""
    for ours in rows:
        same = [row for row in rows if all(row[key] == ours[key] for key in SAME)]
        if _project(ours) == OURS:
            graph = next((row for row in same if row["name"] == f"CUDA graph of {OURS}"), None)
            yield from ((ours, other, graph) for other in same if _project(other) in PEERS and other["x_time"])


def _project(row: Row) -> str:
    return row["name"].partition(" ")[0]


def _total(row: Row) -> float:
    return spread([f + b for f, b in zip(row["forward"], row["backward"], strict=True)])[0]


def table(rows: Iterable[Row], header: str, line: Line) -> str:
    """What was measured where, and the rows, for every machine and size."""
    lines: list[str] = []
    heading = None
    for row in rows:
        if (found := heading_of(row)) != heading:
            heading = found
            lines += ["", heading, "", header] if lines else [heading, "", header]
        lines.append(line(row))
    return "\n".join(lines)


def heading_of(row: dict[str, Any]) -> str:
    heading = f"{_device(row)}, torch {row['machine']['torch']}, {row['date']}, commit {row['commit']}"
    if "boxes" not in row:
        return f"{heading}."
    sizes = f"B={row['batch_size']}, {row['imgsz']} px, C={row['num_classes']}, {row['num_boxes']} boxes ({row['boxes']})"
    return f"{heading}: {row['dtype']}, {sizes}."


def _device(row: Row) -> str:
    machine = row["machine"]
    return machine["gpu"] if row.get("device", "cpu").startswith("cuda") else f"{machine['cpu']}, {machine['threads']} threads"
