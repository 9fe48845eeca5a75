"""Tests of what only kernels have. Those that run kernels need the interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels``."""

from collections.abc import Iterator

import pytest
import torch

import triton_yolo
from bench.meter import Meter
from triton_yolo.kernels import decode, launching, losses, overlap, rows, targets, yolox


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Run operations in interpreted kernels, in fresh memory full of NaN and of the largest integers."""
    if not launching.INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter, which needs TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True)
    with triton_yolo.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shipped_sizes(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch as on a GPU, not with the few large tiles that suit the interpreter."""
    for module in (decode, losses, overlap, rows, targets, yolox):
        monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.fixture
def meter(shipped_sizes: None) -> Iterator[Meter]:
    """Measure every launch, and fail at an access out of bounds or a write race."""
    with Meter() as meter:
        yield meter
