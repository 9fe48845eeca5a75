"""Launches and bytes of the whole criteria against the fewest that the job allows, and against those of the last commit."""

import json

import pytest

from tests.tools import traffic
from tests.tools.traffic import Figures

pytestmark = pytest.mark.usefixtures("interpreted")
BARS = {name: Figures(**bar) for name, bar in json.loads(traffic.BARS.read_text()).items()}


def test_bars_are_those_of_the_design():
    for name, bar in BARS.items():
        ratio, forward = 0.55, 8
        if name.startswith("yolo11"):
            ratio, forward = 1.2 if "bfloat16" in name else 1.12, 9
        assert bar.ratio <= ratio
        assert (bar.forward, bar.backward) == (forward, 1)  # gradients are written forward, and scaled backward
        assert bar.spare <= 48


@pytest.mark.parametrize("name", BARS)
def test_criterion_moves_few_bytes_in_few_launches(name):
    figures, table = traffic.CASES[name]()
    print(f"\n{table}")
    assert all(have <= most for have, most in zip(figures, BARS[name], strict=True)), figures


def test_every_case_has_a_bar():
    assert set(BARS) == set(traffic.CASES)
