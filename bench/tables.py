"""The tables of the README, from the saved results."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from . import parity, results, train_step, training
from .compare import HEADER, markdown
from .traffic import BARS

Row = dict[str, Any]
Line = Callable[[Row], str]


def fill_all(text: str) -> str:
    """Put every table that there are results for between its markers."""
    for command in ("loss", "stages", "assign"):
        text = fill(text, command, table(results.latest(command), HEADER, markdown))
    for command, module in (("train-step", train_step), ("training", training), ("parity", parity)):
        text = fill(text, command, table(results.latest(command), module.HEADER, module.markdown))
    text = fill(text, "resources", resources_table(results.read("resources")))
    return fill(text, "traffic", traffic_table())


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


def traffic_table() -> str:
    """The committed bars, which the tests hold the kernels to."""
    lines = [
        "| kernels of | launches forward + backward | bytes over the least | bytes an anchor beside |",
        "|---|--:|--:|--:|",
    ]
    for name, bar in json.loads(BARS.read_text()).items():
        lines.append(f"| {name} | {bar['forward']} + {bar['backward']} | {bar['ratio']:.3f} | {bar['spare']} |")
    return "\n".join(lines)


def resources_table(rows: Iterable[Row]) -> str:
    """A line for every version of Triton, of the latest figures of each target and type."""
    latest = {(row["triton"], row["target"], row["dtype"]): row for row in rows}
    lines = [
        "| Triton | commit | targets (types) | specialisations | spills on sm_80, sm_90 | spills elsewhere, bytes a thread |",
        "|---|---|---|--:|---|---|",
    ]
    for triton in sorted({key[0] for key in latest}):
        found = [row for key, row in latest.items() if key[0] == triton]
        targets = Counter(row["target"] for row in found)
        cells = [
            triton,
            ", ".join(sorted({row["commit"] for row in found})),
            ", ".join(f"{target} ({number})" for target, number in sorted(targets.items())),
            sum(row["specialisations"] for row in found),
            _spills(row for row in found if row["target"] in ("cuda:80", "cuda:90")),
            _spills(row for row in found if row["target"] not in ("cuda:80", "cuda:90")),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) if latest else ""


def _spills(rows: Iterable[Row]) -> str:
    """The largest of each kernel, and where it has any."""
    sizes: dict[str, int] = {}
    targets: dict[str, set[str]] = {}
    for row in rows:
        for name, size in row["spilled"].items():
            kernel = name.split()[-1]
            sizes[kernel] = max(size, sizes.get(kernel, 0))
            targets.setdefault(kernel, set()).add(row["target"])
    return "; ".join(f"{kernel} {sizes[kernel]} ({', '.join(sorted(targets[kernel]))})" for kernel in sorted(sizes)) or "none"


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
