"""The tables of the README, from the saved results."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from . import results, train_step, training
from .compare import HEADER, markdown

Row = dict[str, Any]
Line = Callable[[Row], str]


def fill_all(text: str) -> str:
    """Put every table that there are results for between its markers."""
    for command in ("loss", "stages", "assign"):
        text = fill(text, command, table(results.latest(command), HEADER, markdown))
    for command, module in (("train-step", train_step), ("training", training)):
        text = fill(text, command, table(results.latest(command), module.HEADER, module.markdown))
    return text


def fill(text: str, command: str, table: str) -> str:
    """Put a table between the markers of a command, where a text has them and there is a table."""
    if not table:
        return text
    start, end = f"<!-- bench {command} -->", f"<!-- end of bench {command} -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


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
    machine = row["machine"]
    device = (
        machine.get("gpu") if row.get("device", "cpu").startswith("cuda") else f"{machine['cpu']}, {machine['threads']} threads"
    )
    heading = f"{device}, torch {machine['torch']}, {row['date']}, commit {row['commit']}"
    if "boxes" not in row:
        return f"{heading}."
    sizes = f"B={row['batch_size']}, {row['imgsz']} px, C={row['num_classes']}, {row['num_boxes']} boxes ({row['boxes']})"
    return f"{heading}: {row['dtype']}, {sizes}."
