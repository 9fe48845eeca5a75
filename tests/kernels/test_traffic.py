"""Launches and bytes of the whole criteria against the fewest that the job allows, and against those of the last commit."""

import json

import pytest

from tests.tools import traffic
from tests.tools.traffic import Figures

pytestmark = pytest.mark.usefixtures("interpreted")
BARS = {name: Figures(**bar) for name, bar in json.loads(traffic.BARS.read_text()).items()}


DESIGN = {
    "yolo11 bfloat16": Figures(9, 1, 1.2, 48),  # gradients are written forward, and scaled backward
    "yolo11 float32": Figures(9, 1, 1.12, 48),
    "yolox": Figures(8, 1, 0.55, 48),
    "yolo11-obb": Figures(9, 2, 1.2, 48),
    "yolo11-seg": Figures(18, 2, 1.35, 440),  # sums of groups: 128 bytes a pixel, but 9 MB at most whatever the batch
    "yolo11-pose": Figures(13, 2, 1.2, 48),
}


def test_bars_are_those_of_the_design():
    for name, bar in BARS.items():
        (design,) = (most for kind, most in DESIGN.items() if name.startswith(f"{kind} "))
        assert bar[:2] == design[:2]
        assert bar.ratio <= design.ratio
        assert bar.spare <= design.spare


@pytest.mark.parametrize("name", BARS)
def test_criterion_moves_few_bytes_in_few_launches(name):
    figures, table = traffic.CASES[name]()
    print(f"\n{table}")
    assert all(have <= most for have, most in zip(figures, BARS[name], strict=True)), figures


def test_every_case_has_a_bar():
    assert set(BARS) == set(traffic.CASES)
