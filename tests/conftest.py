"""Profiles of hypothesis, and which backend the suite runs on."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", derandomize=True, max_examples=60, deadline=None, suppress_health_check=QUIET)
settings.register_profile("random", max_examples=500, deadline=None, suppress_health_check=QUIET)
settings.register_profile("interpreter", settings.get_profile("ci"), max_examples=15)
settings.register_profile("emulator", settings.get_profile("ci"), max_examples=5, phases=[Phase.explicit, Phase.generate])
settings.register_profile(
    "mutants", settings.get_profile("ci"), max_examples=300, phases=[Phase.explicit, Phase.generate], database=None
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
FEW = settings(max_examples=settings().max_examples // 3)
"""Of a test that runs a criterion many times an example."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests import interpreter

    interpreter.prepare()

if EMULATED := os.environ.get("EMULATE"):
    from tests.tools.emulator import emulated

    _emulation = emulated(EMULATED)
    _emulation.__enter__()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_report_header() -> list[str]:
    backend = os.environ.get("TRITON_YOLO_BACKEND", "auto")
    return [f"torch {torch.__version__}, device {DEVICE}, backend {backend}, {settings.get_current_profile_name()} profile"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that remembers nothing of other tests, as which sizes change."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        yield
