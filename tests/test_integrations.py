"""The adapters without their trainers."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("trainer", ["ultralytics", "yolox", "libreyolo"])
def test_a_trainer_is_imported_by_patch_and_not_before(trainer):
    code = f"""
import sys
from triton_yolo.integrations import {trainer} as integration
assert {trainer!r} not in sys.modules
integration.unpatch()
sys.modules[{trainer!r}] = None
try:
    integration.patch()
except ImportError as error:
    assert str(error) == "{trainer} is not installed: pip install 'triton-yolo[{trainer}]'"
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
