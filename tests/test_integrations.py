"""The adapters without their trainers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from triton_yolo.integrations._patching import REQUIREMENTS


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
    assert str(error) == '{trainer} is not installed: pip install "{REQUIREMENTS[trainer]}"'
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("trainer", REQUIREMENTS)
def test_the_line_that_is_advised_installs_what_the_extra_does(trainer):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'{trainer} = ["{REQUIREMENTS[trainer]}"]' in project


@pytest.mark.parametrize("trainer", ["ultralytics", "yolox", "libreyolo"])
def test_a_trainer_that_does_not_import_is_named(trainer, monkeypatch, tmp_path):
    (tmp_path / f"{trainer}.py").write_text("from importlib.metadata import version\nversion('no-such-package')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == trainer]:
        monkeypatch.delitem(sys.modules, name)
    integration = importlib.import_module(f"triton_yolo.integrations.{trainer}")
    with pytest.raises(ImportError, match=f"^{trainer} is installed, but does not import: .*no-such-package"):
        integration.patch()
    sys.modules.pop(trainer, None)
