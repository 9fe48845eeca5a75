"""Every kernel compiles ahead of time. ``python -m tests.tools resources`` prints the whole table; this is a part of it."""

import json
import os
import subprocess
import sys

import pytest

from tests.tools.launches import OPERATORS

# sm_80 and sm_90, the ones with a bar, in two types, and AMD's. Others of NVIDIA's run in the emulator's small step, and
# `python -m tests.tools resources` compiles for all.
PARTS = (
    ("cuda:80", "bfloat16"), ("cuda:80", "float32"), ("cuda:90", "bfloat16"), ("cuda:90", "float32"), ("hip:gfx942", "float32"),
)  # fmt: skip
BARRED = ("cuda:80", "cuda:90")
# Not YOLO11's prepare kernel: it loads an anchor's bins into one thread, 4 bytes at a time in half precision.
FULL_WIDTH = ("_decode_dfl_kernel", "_yolo11_class_kernel")
# Of what takes minutes for every operator, the tools' table has the rest.
LEFT_OUT = ("yolo11_obb_assign", "yolo11_obb_loss", "yolo11_obb_loss, R=1", "yolo11_obb_criterion, no gradient")
CHOSEN = ("decode_dfl", "yolo11_criterion")
CHOSEN_YOLOX = ("yolox_criterion", "yolox_loss")
CHOSEN_TERMS = ("keypoint_loss", "mask_loss")
FULL_WIDTH_YOLOX = ("_yolox_background_kernel", "_yolox_grad_kernel")

# Asked whether a tuple is None, 3.6 makes another of its parts, and fails where one is None.
AS_TRITON_3_6 = """
from triton.compiler import code_generator
from triton.language import core
_unwrap = core._unwrap_if_constexpr
code_generator._unwrap_if_constexpr = lambda x: core.tuple(map(_unwrap, x)) if isinstance(x, core.tuple) else _unwrap(x)
"""
SCRIPT = (
    AS_TRITON_3_6
    + """
import json, sys
from dataclasses import asdict
from tests.tools.launches import OPERATORS
from tests.tools.resources import measure, over_the_bar
target, dtype, *chosen = sys.argv[1:]
rows = list(measure(target, dtype, {name: OPERATORS[name] for name in chosen or OPERATORS}))
assert over_the_bar(rows) == [], over_the_bar(rows)
print(json.dumps([asdict(row) for row in rows]))
"""
)


def compile_alone(script, *arguments):
    """Output of a script in a process of its own: where the interpreter is on, nothing can be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(("target", "dtype"), PARTS)
def test_kernels_compile_without_spills_and_with_wide_loads(target, dtype):
    is_whole = (target, dtype) == ("cuda:90", "bfloat16")
    chosen = [name for name in OPERATORS if name not in LEFT_OUT] if is_whole else (*CHOSEN, *CHOSEN_YOLOX, *CHOSEN_TERMS)
    rows = json.loads(compile_alone(SCRIPT, target, dtype, *chosen).splitlines()[-1])
    assert len({row["kernel"] for row in rows}) >= 16
    if target in BARRED:
        dense = [row for row in rows if row["kernel"] in FULL_WIDTH and row["operator"] in CHOSEN]
        assert {row["kernel"] for row in dense} == set(FULL_WIDTH)
        assert {row["widest_load"] for row in dense} == {128}
        of_positives = [row for row in rows if "_positive" in row["kernel"] or row["kernel"].startswith("_mask_")]
        assert len({row["kernel"] for row in of_positives}) == (11 if is_whole else 10)
        assert max(row["registers"] for row in of_positives) <= 128
        # Rows of 5 + C channels are not aligned, so only channel-first gradients are written 16 bytes at a time.
        dense = [row for row in rows if row["operator"] in CHOSEN_YOLOX and row["kernel"] in FULL_WIDTH_YOLOX]
        dense = {row["kernel"]: row["widest_store"] for row in dense if row["layout"] == "channel-first"}
        assert dense == dict.fromkeys(FULL_WIDTH_YOLOX, 128)


PARAMETERS = """
import sys, torch
from tests.tools.launches import OPERATORS
from tests.tools.resources import compile_launches
for name in ("yolo11_loss", "yolox_loss"):
    operator, layouts = OPERATORS[name]
    for launch in compile_launches("cuda:90", lambda: operator(torch.float64, layouts[0])):
        entry = launch.compiled.asm["ptx"].partition(".visible .entry")[2].partition("{")[0]
        print(launch.kernel, entry.count(".f64"), entry.count(".f32"))
"""


def test_numbers_reach_float64_kernels_unrounded():
    found = {
        kernel: (int(doubles), int(floats))
        for kernel, doubles, floats in map(str.split, compile_alone(PARAMETERS).splitlines())
    }
    gains = {"_yolo11_class_kernel": 1, "_yolo11_total_kernel": 4, "_yolox_total_kernel": 1, "_yolox_grad_kernel": 1}
    gains_and_image_size = {"_yolo11_positives_kernel": 3 + 2}
    assert {kernel: doubles for kernel, (doubles, _) in found.items() if doubles} == gains | gains_and_image_size
    assert not any(floats for _, floats in found.values())
