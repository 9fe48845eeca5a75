"""What is installed where: the wheel's files, a machine without Triton, versions that were tested, lines that are advised."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import triton_yolo as ty
from tests.tools import install, matrix

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree: building leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("triton_yolo", "reference", "tests", "bench", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl", "*.svg"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    (source / "dist").mkdir()
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(source / "dist" / built.stdout.splitlines()[-1])


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = (file for pattern in ("*.py", "py.typed") for file in (ROOT / "triton_yolo").rglob(pattern))
    assert files == {str(file.relative_to(ROOT)) for file in sources}


def test_the_wheel_says_what_it_needs(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == (
        "triton-yolo",
        ty.__version__,
        "Apache-2.0",
    )
    assert {"Programming Language :: Python :: 3.10", "Typing :: Typed"} <= set(metadata.get_all("Classifier"))
    assert any(re.fullmatch(r'triton<.*; sys_platform == "linux"', line) for line in metadata.get_all("Requires-Dist"))
    assert not metadata.get_all("Project-URL")


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == ty.__version__


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_versions_allowed_are_those_tested(package):
    lowest, bound = (matrix.numbers(text) for text in re.search(rf'"{package}>=([\d.]+),<([\d.]+)', PROJECT).groups())
    runs = [(row, row["tests"].get("test", {})) for row in matrix.saved()]
    tested = {matrix.numbers(row[package])[:2] for row, counts in runs if "passed" in counts and not matrix.has_failed(counts)}
    assert min(tested) == lowest
    assert max(tested) == (bound[0], bound[1] - 1)


def test_the_table_of_versions_is_that_of_the_saved_runs():
    page = matrix.PAGE.read_text()
    assert matrix.with_table(page, matrix.table(matrix.saved())) == page


def test_every_run_has_its_own_commit_and_what_of_the_tests_it_was():
    versions = {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.11.0", "triton": "3.6.0"}
    runs = [
        {**versions, "commit": "aaaaaaa", "tests": {"test": {"passed": 9}, "compiled": {"failed": 1}}},
        {**versions, "commit": "bbbbbbb", "tests": {"compiled": {"passed": 2, "skipped": 1}}, "chosen": "yolo11"},
    ]
    table = matrix.table(matrix.saved("\n".join(map(json.dumps, runs))))
    cells = ["9 passed; aaaaaaa", "not run", "2 passed, 1 skipped; only yolo11; bbbbbbb"]
    assert table.splitlines()[-1] == f"| {' | '.join(['3.11.7', '2.11.0', '3.6.0', '2.4.6', *cells])} |"


def test_a_run_without_an_outcome_is_an_error():
    output = "....\n===== 2 failed, 1218 passed, 7 skipped in 976.65s (0:16:16) =====\n"
    assert matrix.outcome(output, 1) == {"failed": 2, "passed": 1218, "skipped": 7}
    assert matrix.outcome("3 passed, 2 deselected in 0.12s\n", 0) == {"passed": 3}
    assert matrix.outcome("no such interpreter\n", 2) == {"errors": 1}
    assert matrix.outcome("3 passed in 0.12s\nmake: *** Killed\n", 2) == {"passed": 3, "errors": 1}


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None  # what import finds where it is not installed
import torch, triton_yolo as ty
from triton_yolo import _backend

criterion = ty.YOLO11Loss(num_classes=2, strides=(8,), reg_max=4)
dist, scores = torch.rand(1, 4, 16, requires_grad=True), torch.rand(1, 4, 2, requires_grad=True)
arguments = dist, scores, [(2, 2)], torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9]])
criterion(*arguments).loss.backward()
assert dist.grad.isfinite().all() and dist.grad.any() and scores.grad.any()
assert _backend.implementation(torch.device("cpu")).__name__ == "triton_yolo.eager"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert _backend.implementation(torch.device("cuda")).__name__ == "triton_yolo.eager"
assert "Triton is not installed: cuda tensors take the eager backend" in str(said[0].message)
with ty.backend("triton"):
    try:
        criterion(*arguments)
    except RuntimeError as error:
        print(error)
"""


def test_where_triton_is_not_installed_the_eager_backend_serves():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stderr == ""
    assert found.stdout == "backend 'triton' needs Triton, which is not installed; use backend 'eager'\n"


@pytest.mark.parametrize("build", ["", "cpu", "cu130"])
def test_make_takes_another_build_of_pytorch(build, tmp_path):
    command = ["make", "--dry-run", "train", f"TORCH={build}", f"VENV={tmp_path}"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in planned.splitlines() if "pip install" in line)
    index = install.CPU_INDEX.removesuffix("cpu") + build
    assert re.findall(r"--extra-index-url (\S+)", line) == ([index] if build else [])
    assert "train TORCH=cpu" in (ROOT / "README.md").read_text()


def test_lines_that_pip_is_given():
    """``make dist`` runs them."""
    first, second = install.advised()
    assert first[:3] == ["install", "torch", "torchvision"]
    assert second[:2] == ["install", ".[ultralytics]"]
    extras = re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("[tool")[0], re.M)
    for file in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for extra in re.findall(r"pip install [^\n`]*\.\[(\w+)\]", file.read_text()):
            assert extra in extras, file.name
