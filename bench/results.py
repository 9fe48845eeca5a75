"""Results as lines of JSON, a file a machine. Every line says when, of which commit and on what it was measured."""

import datetime
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "numpy", "ultralytics", "pixeltable-yolox", "libreyolo")


def append(command: str, row: dict[str, Any], file: Path | None = None) -> None:
    """Add a row to ``file``, by default that of this machine."""
    file = file or FOLDER / f"{_slug()}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({"command": command, **provenance(), **row}) + "\n")


def read(command: str) -> Iterator[dict[str, Any]]:
    """All rows of a command, machine by machine, oldest first."""
    for file in sorted(FOLDER.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["command"] == command:
                yield row


def latest(command: str) -> list[dict[str, Any]]:
    """The rows of the last run of a command on each machine, of each thing that it measures."""
    last: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read(command):
        machine = row["machine"].get("gpu") or row["machine"]["cpu"]
        sizes = (row.get(name) for name in ("dtype", "batch_size", "boxes", "model", "what"))
        run = last.setdefault((machine, *sizes), [])
        if run and run[-1]["run"] != row["run"]:
            run.clear()
        run.append(row)
    return [row for run in last.values() for row in run]


def provenance() -> dict[str, Any]:
    return {"date": datetime.date.today().isoformat(), "commit": _commit(), "run": _RUN, "machine": machine()}


def machine() -> dict[str, Any]:
    """What the numbers are taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count() or 0, "threads": torch.get_num_threads()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,clocks.mem"
        found[query] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found


def _slug() -> str:
    found = machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{found.get('gpu', found['cpu'])} {found['cores']} cores".lower()).strip("-")


@cache
def _commit() -> str:
    """A tree that differs in more than results is dirty. A copy without a repository is told by its package."""
    git = "git", "-C", str(FOLDER.parent)
    if _output(*git, "ls-files", "--error-unmatch", Path(__file__).name) == "unknown":  # none, or another's
        return f"with triton_yolo {tree_id(FOLDER.parents[1] / 'triton_yolo')[:7]}"
    commit = _output(*git, "describe", "--always", "--exclude=*")
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(exclude){FOLDER.name}")
    return f"{commit}-dirty" if changes else commit


def tree_id(folder: Path) -> str:
    """What ``git rev-parse COMMIT:triton_yolo`` says of a folder's sources."""
    entries = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            entries.append((f"{path.name}/", b"40000 " + path.name.encode() + b"\0" + bytes.fromhex(tree_id(path))))
        elif path.is_file() and path.suffix != ".pyc":
            mode = b"100755 " if os.access(path, os.X_OK) else b"100644 "
            entries.append((path.name, mode + path.name.encode() + b"\0" + _object_id(b"blob", path.read_bytes()).digest()))
    return _object_id(b"tree", b"".join(entry for _, entry in sorted(entries))).hexdigest()


def _object_id(kind: bytes, content: bytes) -> Any:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


_RUN = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
