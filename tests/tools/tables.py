"""The tables of docs/benchmarks.md that proofs fill."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import results
from bench.tables import PAGES, fill, table

from . import parity
from .traffic import BARS

RESOURCES = Path(__file__).with_name("resources.jsonl")
Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    for page in PAGES:
        page.write_text(fill_all(page.read_text()))


def fill_all(text: str) -> str:
    """Put every table that there are figures for between its markers."""
    text = fill(text, "parity", table(results.latest("parity"), parity.HEADER, parity.markdown))
    text = fill(text, "resources", resources_table(map(json.loads, RESOURCES.read_text().splitlines())))
    return fill(text, "traffic", traffic_table())


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
