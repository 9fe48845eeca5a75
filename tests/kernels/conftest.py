"""Tests of what only kernels have. Those that run kernels need the interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels``."""

from collections.abc import Iterator

import pytest
import torch

import triton_yolo
from bench.meter import Meter, shipped_sizes
from triton_yolo.kernels import launch


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Run operations in interpreted kernels, in fresh memory full of NaN and of the largest integers."""
    if not launch.INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter, which needs TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True)
    with triton_yolo.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(name="shipped_sizes")
def _shipped_sizes(interpreted: None) -> Iterator[None]:
    """Launch as on a GPU."""
    with shipped_sizes():
        yield


@pytest.fixture
def meter(shipped_sizes: None) -> Iterator[Meter]:
    """Measure every launch, and fail at an access out of bounds or a write race."""
    with Meter() as meter:
        yield meter
