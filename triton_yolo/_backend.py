"""Which implementation runs an operation."""

import functools
import importlib
import importlib.util
import os
from contextvars import ContextVar
from typing import Any

import torch

from . import _checks

_NAMES = ("auto", "triton", "eager")
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called cuda too


def _checked(name: str, argument: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    return name


_default = _checked(os.environ.get("TRITON_YOLO_BACKEND") or "auto", "TRITON_YOLO_BACKEND")
_calls: list["backend"] = []  # of the process, the last one counts
_blocks: ContextVar[tuple[str, ...]] = ContextVar("triton_yolo_backends", default=())


class backend:  # noqa: N801 (a function to its users, as ``torch.set_grad_enabled`` is)
    """Choose the implementation of every operation from now on, in the whole process; in a ``with`` statement, for its block.

    ``"auto"`` (the default) runs Triton kernels on CUDA, ROCm and XPU tensors and sparse PyTorch elsewhere, or where Triton is
    not installed, which a warning says. ``"eager"`` runs
    sparse PyTorch on any device; it synchronises host and device. ``"triton"`` runs Triton kernels, on CPU tensors only under
    ``TRITON_INTERPRET=1``, and raises an error where it cannot. A block counts for its thread or task alone. Backward runs
    where forward ran. The environment variable ``TRITON_YOLO_BACKEND`` sets the default for a process.

    Raises:
        ValueError: ``name`` is none of these.

    Example:
        >>> with ty.backend("eager"):
        ...     overlap = ty.bbox_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "name")
        del _calls[:-99]
        _calls.append(self)

    def __enter__(self) -> None:
        if self in _calls:  # it is a block, and nobody else's business
            _calls.remove(self)
        begin(self._name)

    def __exit__(self, *_: object) -> None:
        end()


def begin(name: str) -> None:
    """Begin a block of this thread or task."""
    _blocks.set((*_blocks.get(), name))


def end() -> None:
    _blocks.set(_blocks.get()[:-1])


def current() -> str:
    """The backend that was chosen for this thread or task, or for the process."""
    blocks = _blocks.get()
    if blocks:
        return blocks[-1]
    return _calls[-1]._name if _calls else _default


def implementation(device: torch.device, name: str = "") -> Any:
    """Return what has the operations for tensors on ``device`` as attributes: of the backend ``name``, or the current one."""
    name = name or current()
    if name == "eager" or (name == "auto" and device.type not in _TRITON_DEVICES):
        return _module("eager")
    if not _has_triton():
        return _without_triton(device, name)
    if device.type == "cpu" and not _is_interpreted():
        raise RuntimeError(
            "backend 'triton' runs on CPU tensors only in Triton's interpreter: "
            "set TRITON_INTERPRET=1 in the environment before Python starts, or use backend 'eager'"
        )
    return _module("kernels")


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _without_triton(device: torch.device, name: str) -> Any:
    if name == "triton":
        raise RuntimeError("backend 'triton' needs Triton, which is not installed; use backend 'eager'")
    _checks.warn(f"Triton is not installed: {device.type} tensors take the eager backend, which synchronises")
    return _module("eager")


@functools.cache
def _is_interpreted() -> bool:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)
