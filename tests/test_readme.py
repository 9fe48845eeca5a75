"""What the README and the documentation show works as it stands there."""

import contextlib
import doctest
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_yolo as ty
from bench import peers
from bench import tables as bench_tables
from tests.tools import tables as proof_tables

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
PAGES = {str(file.relative_to(ROOT)): file for file in FILES}
README = PAGES["README.md"].read_text()
EXAMPLES = [name for name in ty.__all__ if callable(getattr(ty, name)) and not name.endswith(("Output", "Result"))]
MARKS = {
    "": (),
    "peers": pytest.mark.peers,
    "cuda": pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
}
"""What a python block may need, a word after ``python``."""
on_every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, needs: str = "") -> list[str]:
    """The python blocks of a page that need the same."""
    fence = f"```python {needs}".strip()
    return re.findall(rf"^{fence}\n(.*?)^```", PAGES[page].read_text(), re.M | re.S)


CASES = [pytest.param(page, needs, marks=MARKS[needs]) for page in PAGES for needs in MARKS if blocks(page, needs)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of PyTorch about itself
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("page", "needs"), CASES)
def test_python_blocks_run_one_after_the_other(page, needs):
    names: dict[str, Any] = {}
    with peers.contained() if needs == "peers" else contextlib.nullcontext():
        for block in blocks(page, needs):
            exec(block, names)


def test_every_python_block_is_run():
    for page, file in PAGES.items():
        found = [block for needs in MARKS for block in blocks(page, needs)]
        assert len(found) == len(re.findall(r"^ *```py", file.read_text(), re.M)), page


def test_the_loop_of_the_readme_lowers_the_loss():
    (loop,) = blocks("README.md")
    last = []
    for steps in (1, 5):
        torch.manual_seed(0)
        names: dict[str, Any] = {}
        exec(loop.replace("range(5)", f"range({steps})"), names)
        last.append(names["result"].loss)
    assert last[1] < last[0]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", bench_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_saved_results(page):
    text = page.read_text()
    assert proof_tables.fill_all(bench_tables.fill_all(text)) == text, "run python -m bench plot; python -m tests.tools tables"


@on_every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = PAGES[page].parent / path if path else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> Iterator[str]:
    """As GitHub makes them of headings."""
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@on_every_page
def test_files_and_targets_that_are_named_exist(page):
    text = PAGES[page].read_text()
    for name in re.findall(r"`((?:triton_yolo|reference|tests|bench|examples|docs|\.ci)/[\w./-]*)", text):
        assert (ROOT / name).exists() or name == "docs/api", name
    for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    value = getattr(ty, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(value, name, globs={"torch": torch, "ty": ty})
    assert test.examples
    report: list[str] = []
    failures = doctest.DocTestRunner().run(test, out=report.append)
    assert not failures.failed, "".join(report)


def test_help_begins_with_what_there_is():
    first_page = pydoc.plain(pydoc.render_doc(ty)).partition("PACKAGE CONTENTS")[0]
    assert all(name in first_page for name in ty.__all__)
    assert len(first_page.splitlines()) < 60


def test_the_api_reference_is_made_of_the_docstrings(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_api.py"), str(tmp_path)], check=True)
    page = (tmp_path / "triton_yolo.html").read_text()
    assert all(f'id="{name}"' in page for name in ty.__all__)
    assert page.count('id="example"') == len(EXAMPLES)
    for trainer in ("ultralytics", "yolox", "libreyolo"):
        assert 'id="patch"' in (tmp_path / "triton_yolo" / "integrations" / f"{trainer}.html").read_text()
