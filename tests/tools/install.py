"""Tries what ``python -m build`` left in ``dist`` and the lines that ``docs/versions.md`` advises: ``make dist``.

The wheel is installed in an empty environment, where a criterion runs. The lines for a machine without a GPU run with an
index of empty packages in place of PyTorch's, which has CPU builds of torch and torchvision: they may not be replaced.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "versions.md"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILDS = {"torch": ("2.15.0+cpu", ""), "torchvision": ("0.29.2+cpu", "Requires-Dist: torch==2.15.0\n")}
"""Versions and what they ask for."""
USE = """
import torch, triton_yolo as ty
criterion = ty.YOLO11Loss(num_classes=2, strides=(8,), reg_max=4)
dist, scores = torch.zeros(1, 4, 16, requires_grad=True), torch.zeros(1, 4, 2, requires_grad=True)
criterion(dist, scores, [(2, 2)], torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9]])).loss.backward()
print(ty.__file__, ty.__version__, torch.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", dest="constraints", type=Path, help="what pip installs beside the wheel; default: the newest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(Path(folder), arguments.constraints)
    with tempfile.TemporaryDirectory() as folder:
        try_advice(Path(folder))


def try_wheel(folder: Path, constraints: Path | None) -> None:
    """Install the wheel in an empty environment and train a step with it, far from the sources; warnings are errors."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    python = environment(folder)
    options = ["-c", str(constraints.resolve())] if constraints else []
    run(python, "-m", "pip", "install", "--quiet", str(wheel), *options)
    run(python, "-m", "pip", "check")
    run(python, "-W", "error", "-c", USE, cwd=folder)


def try_advice(folder: Path) -> None:
    """Run the advised lines as they stand, but for the address of PyTorch's index and the last one's effect."""
    python, index = environment(folder), folder / "index"
    for name, (version, needs) in BUILDS.items():
        write_wheel(index / name, name, version, needs)
    first, second = ([word.replace(CPU_INDEX, index.as_uri()) for word in line] for line in advised())
    run(python, "-m", "pip", *first, "--quiet")
    for extra in ("ultralytics", "yolox", "libreyolo", "lightning"):
        line = [word.replace("[ultralytics]", f"[{extra}]") for word in second]
        report = folder / f"{extra}.json"
        run(python, "-m", "pip", *line, "-qq", "--dry-run", "--report", str(report), cwd=ROOT)
        names = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
        replaced = sorted(name for name in names if name in BUILDS or name.startswith("nvidia-cu"))
        print(f"{extra}: {len(names)} packages, {', '.join(replaced) or 'none'} in place of what was there")
        if replaced:
            sys.exit(1)


def advised() -> list[list[str]]:
    """What follows ``pip`` in the lines for a machine without a GPU."""
    lines = re.findall(rf"^pip (install .*{re.escape(CPU_INDEX)}.*)$", PAGE.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def environment(folder: Path) -> Path:
    venv.create(folder / "environment", with_pip=True)
    return folder / "environment" / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def write_wheel(folder: Path, name: str, version: str, needs: str) -> None:
    """Write a package without content, and the page of an index that names it."""
    folder.mkdir(parents=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{file.name.replace("+", "%2B")}">{file.name}</a>')


if __name__ == "__main__":
    main()
