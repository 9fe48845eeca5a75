"""Drivers of Triton for machines without a GPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class TargetDriver(DriverBase):
    """Says what to compile for: "cuda:90", "hip:gfx942"."""

    def __init__(self, target: str) -> None:
        backend, _, arch = target.partition(":")
        self.target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def active(driver: DriverBase) -> Iterator[None]:
    """Launch through this driver, and keep nothing that was compiled for another one."""
    _forget_binaries()
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        try:
            yield
        finally:
            _forget_binaries()  # while there is a driver: Triton 3.9 has it unload them


def _forget_binaries() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("triton_yolo.kernels"):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()
