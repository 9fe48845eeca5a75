"""What a step of a criterion costs the host, as a program of its own: run by ``bench host`` for this version and an older one.

It uses nothing but the public interface, and without a GPU a driver of Triton that compiles for one and launches nothing. It
reads a line of input, the number of steps, and answers with the median of their time in microseconds; first it prints counts.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import triton_yolo as ty
from bench.cases import make_case
from bench.systems import SYSTEMS
from triton_yolo import _backend, _checks


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
        raise NotImplementedError("nothing is launched from C++")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed")


class NullDriver(TargetDriver):
    """Compiles for sm_90; launches are counted."""

    def __init__(self) -> None:
        super().__init__("cuda:90")
        self.launches = 0
        self.launcher_cls = lambda source, metadata: self._launch
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "warpSize": 32},
        )

    def _launch(self, *_: Any) -> None:
        self.launches += 1


@contextmanager
def without_machine_code() -> Iterator[None]:
    """Compile to PTX and no further, for those who run none: binaries of this kind stay apart from real ones."""
    from triton.backends.nvidia.compiler import CUDABackend

    folder = Path(tempfile.gettempdir()) / f"triton_yolo_ptx_{triton.__version__}"
    with (
        mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(folder)),
        mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
    ):
        yield


# Mocks would make calls of their own.
def _nothing(*_: Any) -> None:
    pass


def _yes() -> bool:
    return True


@contextmanager
def launching_nothing() -> Iterator[NullDriver]:
    """Run the kernels' backend on CPU tensors; what a GPU's tensors are not looked at for is not looked at."""
    driver = NullDriver()
    with ExitStack() as patches:
        patches.enter_context(without_machine_code())
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        patches.enter_context(mock.patch.object(_backend, "_is_interpreted", _yes))
        for name in ("rows_in_range", "normalised_rows", "raw_rows", "keypoint_places", "targets"):
            if hasattr(_checks, name):
                patches.enter_context(mock.patch.object(_checks, name, _nothing))
        patches.enter_context(ty.backend("triton"))
        yield driver


def make_step(system: str, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The forward pass of a criterion on predictions in a head's own layout."""
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=80)
    call = SYSTEMS[system].call(case, dtype, device=device)

    def step() -> torch.Tensor:
        for leaf in call.leaves:
            leaf.grad = None
        return call.criterion(*call.leaves, call.feat_shapes, *call.truth).loss  # no call that is not a criterion's

    return step


def count_calls(step: Callable[[], torch.Tensor]) -> int:
    """Python functions that are called in a step, backward too."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    loss = step()
    sys.setprofile(None)
    sys.setprofile(profile)
    loss.backward()
    sys.setprofile(None)
    return calls


def count_allocations(step: Callable[[], torch.Tensor]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        step().backward()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def count(step: Callable[[], torch.Tensor], driver: NullDriver | None) -> dict[str, int]:
    """Calls, allocations and, without a GPU, launches of a step."""
    for _ in range(10):
        step().backward()
    counts = {"calls": count_calls(step), "allocations": count_allocations(step)}
    if driver is not None:
        driver.launches = 0
        step().backward()
        counts["launches"] = driver.launches
    return counts


def serve(system: str, dtype: torch.dtype) -> None:
    is_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        driver = None if is_gpu else stack.enter_context(launching_nothing())
        step = make_step(system, torch.device("cuda" if is_gpu else "cpu"), dtype)
        print(json.dumps(count(step, driver)), flush=True)
        for line in sys.stdin:
            times = []
            for _ in range(int(line)):
                start = time.perf_counter()
                step().backward()
                times.append(time.perf_counter() - start)
            if is_gpu:
                torch.cuda.synchronize()
            print(json.dumps(1e6 * statistics.median(times)), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], getattr(torch, sys.argv[2]))
