"""Runs the tests on other versions of Python, torch and Triton, each set in an environment of its own: ``make matrix``.

It needs no package itself. Every result is a line in ``matrix.jsonl``; the table of them goes to ``docs/versions.md``. An
environment takes up to 6 GB, and goes when its tests are done.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("matrix.jsonl")
PAGE = ROOT / "docs" / "versions.md"
VERSIONS = (  # Python, torch and the Triton that its CUDA build demands
    ("3.11", "2.11.0", "3.6.0"),
    ("3.11", "2.13.0", "3.7.1"),
    ("3.11", "2.14.1", "3.8.0"),
    ("3.11", "2.15.0", "3.9.0"),
    ("3.10", "2.11.0", "3.6.0"),
    ("3.12", "2.14.1", "3.8.0"),
    ("3.13", "2.15.0", "3.9.0"),
)
COLUMNS = {"python": "Python", "torch": "torch", "triton": "Triton", "numpy": "NumPy"}
BOUNDS = "tests/test_packaging.py::test_the_versions_allowed_are_those_tested"  # which these runs decide
PARTS = {"test": "eager backend", "interpreted": "kernels, interpreted", "compiled": "kernels, compiled"}
"""Targets of the Makefile, and what the table calls them."""
INSTALLED = """
import json, platform, numpy, torch, triton
versions = {module.__name__: str(module.__version__) for module in (torch, triton, numpy)}
print(json.dumps({"python": platform.python_version(), **versions}))
"""


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tree = commit()  # before results change it
    for versions in VERSIONS:
        name = "python{}-torch{}-triton{}".format(*versions)
        if arguments.only in name:
            try_versions(name, *versions, tree, arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="environments with this in their name, e.g. torch2.15")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("-k", dest="chosen", default="", metavar="EXPRESSION", help="only tests that pytest's -k chooses")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "matrix", help="environments and logs; %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--jobs", type=int, default=2)
    return parser


def try_versions(name: str, python: str, torch: str, triton: str, tree: str, arguments: argparse.Namespace) -> None:
    """Make an environment, run the tests there and append a line of results."""
    if not has(f"python{python}"):
        print(f"{name}: no python{python} on this machine")
        return
    environment = arguments.folder / name
    constraints = environment.with_suffix(".txt")
    constraints.write_text(f"torch=={torch}\ntriton=={triton}\n")
    settings = [f"VENV={environment}", f"PYTHON=python{python}", f"CONSTRAINTS={constraints}", f"JOBS={arguments.jobs}"]
    chosen = f" -k '{arguments.chosen}'" if arguments.chosen else ""
    settings.append(f"ARGS=--deselect {BOUNDS}{chosen}")
    counts = {part: make(part, settings, arguments.folder / f"{name}-{part}.log") for part in arguments.parts}
    found = subprocess.run([environment / "bin" / "python", "-c", INSTALLED], capture_output=True, text=True)
    row = {"date": datetime.date.today().isoformat(), "commit": tree, **json.loads(found.stdout or "{}"), "tests": counts}
    row |= {"chosen": arguments.chosen} if arguments.chosen else {}
    print(f"{name}: {counts}")
    if found.returncode == 0:
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), table(saved())))
    if not arguments.keep:
        shutil.rmtree(environment, ignore_errors=True)


def has(python: str) -> bool:
    """Whether a name runs an interpreter: a version manager's link may stand where none is."""
    return bool(shutil.which(python)) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def make(part: str, settings: list[str], log: Path) -> dict[str, int]:
    """Run a target of the Makefile and return how many tests had which outcome."""
    with log.open("w") as file:
        done = subprocess.run(["make", part, *settings], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return outcome(log.read_text(), done.returncode)


def outcome(output: str, status: int) -> dict[str, int]:
    """Numbers in pytest's last line; a run that fails without a failed test, or has no such line, counts as an error."""
    lines = re.findall(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", output, re.MULTILINE)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", lines[-1])} if lines else {}
    counts.pop("deselected", None)
    if status and not has_failed(counts):
        counts["errors"] = 1
    return counts


def has_failed(counts: dict[str, int]) -> bool:
    return bool(counts.keys() & {"failed", "error", "errors"})


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def saved(lines: str | None = None) -> list[dict[str, Any]]:
    """The latest run of each part, by versions, and of what commit and which tests it was."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in map(json.loads, (lines or RESULTS.read_text()).splitlines()):
        of = dict.fromkeys(row["tests"], (row["commit"], row.get("chosen", "")))
        before = latest.get(key := tuple(row[name] for name in COLUMNS), {"tests": {}, "of": {}})
        latest[key] = {**row, "tests": {**before["tests"], **row["tests"]}, "of": {**before["of"], **of}}
    return [latest[key] for key in sorted(latest, key=lambda key: [numbers(version) for version in key])]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join([*COLUMNS.values(), *PARTS.values()])} |", "|---" * (len(COLUMNS) + len(PARTS)) + "|"]
    lines += [f"| {' | '.join([*(row[name] for name in COLUMNS), *(cell(row, part) for part in PARTS)])} |" for row in rows]
    return "\n".join(lines)


def cell(row: dict[str, Any], part: str) -> str:
    """How a part went, and what of it ran."""
    if part not in row["tests"]:
        return "not run"
    commit, chosen = row["of"][part]
    counts = ", ".join(f"{number} {word}" for word, number in row["tests"][part].items())
    return f"{counts}; {f'only {chosen}; ' if chosen else ''}{commit}"


def with_table(page: str, table: str) -> str:
    start, end = "<!-- matrix -->", "<!-- end of matrix -->"
    return f"{page.partition(start)[0]}{start}\n{table}\n{end}{page.partition(end)[2]}"


if __name__ == "__main__":
    main()
