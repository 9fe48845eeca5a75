"""Launching through another driver of Triton, as on machines without a GPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import triton
from triton.backends.driver import DriverBase

KERNELS = ("triton_yolo.kernels", "tests.emulator.kernels")
"""Modules of kernels."""


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
        if name.startswith(KERNELS):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()
