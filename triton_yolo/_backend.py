"""Which implementation runs an operation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch

_NAMES = ("auto", "triton", "eager")
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called cuda too


def _checked(name: str, argument: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    return name


_current = _checked(os.environ.get("TRITON_YOLO_BACKEND", "auto"), "TRITON_YOLO_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every operation inside the ``with`` block, in the whole process.

    ``"auto"`` (the default) runs Triton kernels on CUDA, ROCm and XPU tensors and sparse PyTorch elsewhere. ``"eager"`` runs
    sparse PyTorch on any device; it synchronises host and device. ``"triton"`` runs Triton kernels, on CPU tensors only under
    ``TRITON_INTERPRET=1``. The environment variable ``TRITON_YOLO_BACKEND`` sets the default for a process.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _current
    previous, _current = _current, _checked(name, "name")
    try:
        yield
    finally:
        _current = previous


def implementation(device: torch.device) -> ModuleType:
    """Return the module with the operations for tensors on ``device``."""
    from . import eager

    wants_triton = _current == "triton" or (_current == "auto" and device.type in _TRITON_DEVICES)
    if not wants_triton:
        return eager
    if find_spec("triton_yolo.kernels") is None:
        raise NotImplementedError(
            "backend 'triton': this version of triton_yolo has no Triton kernels yet; "
            "use triton_yolo.backend('eager') or TRITON_YOLO_BACKEND=eager"
        )
    raise AssertionError
