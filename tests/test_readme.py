"""What the README shows works as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["result"].loss.isfinite()
        assert all(p.grad is not None for p in names["model"].parameters())


def test_public_names_are_mentioned():
    import triton_yolo as ty

    for name in ("YOLO11Loss", "YOLOXLoss", "TaskAlignedAssigner", "SimOTAAssigner", "decode_dfl", "align_metric"):
        assert name in ty.__all__
        assert f"`{name}`" in README
