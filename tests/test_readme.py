"""What the README and the documents show works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


def run_blocks(text: str) -> list[dict[str, Any]]:
    """The names that every Python block leaves."""
    left = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict[str, Any] = {}
        exec(block, names)
        left.append(names)
    return left


def test_python_blocks_run():
    blocks = run_blocks(README)
    assert blocks
    for names in blocks:
        assert names["result"].loss.isfinite()
        assert all(p.grad is not None for p in names["model"].parameters())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_of_documents_run(path):
    for names in run_blocks(path.read_text()):
        assert "result" not in names or names["result"].loss.isfinite()


def test_public_names_are_mentioned():
    import triton_yolo as ty

    for name in ("YOLO11Loss", "YOLOXLoss", "TaskAlignedAssigner", "SimOTAAssigner", "decode_dfl", "align_metric"):
        assert name in ty.__all__
        assert f"`{name}`" in README
