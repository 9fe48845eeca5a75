"""Compile every kernel ahead of time for every target, as its operator would launch it, and list what it takes.

No GPU is needed: the operators run on meta tensors, and each launch stops after compilation.

    python -m bench.resources [--targets cuda:80 hip:gfx942] [--dtypes float16 float32] [--csv file]
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = (*(f"cuda:{arch}" for arch in (75, 80, 86, 89, 90, 100, 120)), "hip:gfx90a", "hip:gfx942")
DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class Resources:
    """What one kernel takes in one specialisation. Bytes of spills are per thread, of shared memory per program."""

    operator: str
    kernel: str
    target: str
    dtype: str
    layout: str
    num_warps: int
    registers: int
    spill: int
    shared: int
    widest_load: int
    widest_store: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--operators", default="", help="only those that start so")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}")
    rows = []
    for target in arguments.targets:
        for dtype in arguments.dtypes:
            chosen = {name: value for name, value in OPERATORS.items() if name.startswith(arguments.operators)}
            for row in measure(target, dtype, chosen):
                rows.append(row)
                print(
                    f"{row.target:10} {row.dtype:8} {row.layout:13} {row.operator:24} {row.kernel:32} {row.num_warps} warps "
                    f"{row.registers:3} registers {row.spill:4} B spilled {row.shared:6} B shared  "
                    f"loads to {row.widest_load:3} bits, stores to {row.widest_store:3}", flush=True,
                )  # fmt: skip
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))


def measure(target: str, dtype: str, operators: "dict[str, Operator] | None" = None) -> Iterator[Resources]:
    """Compile for ``target`` ("cuda:90", "hip:gfx942") and yield one row a kernel and specialisation."""
    seen = set()
    for name, (operator, layouts) in (OPERATORS if operators is None else operators).items():
        for layout in layouts:
            for kernel, compiled in compile_launches(target, lambda o=operator, at=layout: o(getattr(torch, dtype), at)):
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                registers, spill, load, store = _usage(compiled, target)
                yield Resources(
                    name, kernel, target, dtype, layout, compiled.metadata.num_warps,
                    registers, spill, compiled.metadata.shared, load, store,
                )  # fmt: skip


# ---- what is launched: sizes of COCO at 640 px, class logits and box logits in the head's own layout or the other one

BATCH, SHAPES, STRIDES, CLASSES, REG_MAX, ROWS, SLOTS = 16, (80, 80, 40, 40, 20, 20), (8.0, 16.0, 32.0), 80, 16, 112, 20
ANCHORS = 8400

Operator = tuple[Callable[[torch.dtype, str], Any], tuple[str, ...]]
LAYOUTS = ("channel-first", "channel-last")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _preds(dtype: torch.dtype, layout: str, channels: int) -> torch.Tensor:
    if layout == "channel-last":
        return _empty(BATCH, ANCHORS, channels, dtype=dtype)
    return _empty(BATCH, channels, ANCHORS, dtype=dtype).transpose(1, 2)


def _decode(reg_max: int, has_strides: bool) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        dist, strides = _preds(dtype, layout, 4 * reg_max), _empty(ANCHORS) if has_strides else None
        boxes = kernels.decode_dfl(dist, _empty(ANCHORS, 2), strides, reg_max)
        kernels.decode_dfl_backward(boxes, dist, strides, reg_max)

    return operator


def _bbox_iou(kind: str) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        a, b = _empty(4096, 4, dtype=dtype), _empty(4096, 4, dtype=dtype)
        kernels.bbox_iou_backward(kernels.bbox_iou(a, b, kind, 1e-7), a, b, kind, 1e-7)

    return operator


def _rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(count, dtype=torch.int64), _empty(count, dtype=torch.int64), _empty(count, 4)


def _unpack_rows(dtype: torch.dtype, layout: str) -> None:
    from triton_yolo import kernels

    kernels.unpack_rows(_empty(ROWS, 6, dtype=dtype), 640.0, 640.0)


def _assign(topk2: int | None, min_box_side: float) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        kernels.yolo11_assign(
            _preds(dtype, layout, 4 * REG_MAX), _preds(dtype, layout, CLASSES), *_rows(ROWS), SHAPES, STRIDES, REG_MAX,
            10, topk2, 0.5, 6.0, min_box_side,
        )  # fmt: skip

    return operator


def _loss(reg_max: int, num_classes: int, has_weights: bool) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        dist, scores = _preds(dtype, layout, 4 * reg_max), _preds(dtype, layout, num_classes)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        target_row, target_score = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(BATCH, ANCHORS, dtype=working)
        one, (_, labels, boxes) = _empty(dtype=working), _rows(ROWS)
        tail = (labels, boxes, _empty(num_classes) if has_weights else None, SHAPES, STRIDES, reg_max, (7.5, 0.5, 1.5))
        kernels.yolo11_loss(dist, scores, target_row, target_score, one, 1, *tail)
        kernels.yolo11_loss_backward(one, dist, scores, target_row, target_score, one, 1, *tail)

    return operator


def _task_aligned_assign(dtype: torch.dtype, layout: str) -> None:
    from triton_yolo import kernels

    boxes, points = _empty(BATCH, ANCHORS, 4, dtype=dtype), _empty(ANCHORS, 2)
    kernels.task_aligned_assign(
        _preds(dtype, layout, CLASSES), boxes, points, *_rows(BATCH * SLOTS), 13, None, 1.0, 6.0, 0.0, 1e-9
    )


def _stages(dtype: torch.dtype, layout: str) -> None:
    from triton_yolo import kernels

    _, labels, gt_boxes = _rows(BATCH * SLOTS)
    boxes, points, mask = _empty(BATCH, ANCHORS, 4, dtype=dtype), _empty(ANCHORS, 2), _empty(BATCH, SLOTS, dtype=torch.bool)
    labels, gt_boxes = labels.view(BATCH, SLOTS), gt_boxes.view(BATCH, SLOTS, 4)
    scores = _preds(dtype, layout, CLASSES)
    metric, _ = kernels.align_metric(scores, boxes, points, labels, gt_boxes, mask, 1.0, 6.0, 0.0)
    kernels.select_topk_candidates(metric.to(dtype), 13, mask)


def _decode_yolox(dtype: torch.dtype, layout: str) -> None:
    from triton_yolo import kernels

    preds, points, strides = _preds(dtype, layout, 5 + CLASSES), _empty(ANCHORS, 2), _empty(ANCHORS)
    kernels.decode_yolox_backward(kernels.decode_yolox(preds, points, strides), preds, strides)


def _simota_assign(dtype: torch.dtype, layout: str) -> None:
    from triton_yolo import kernels

    scores, objectness, boxes = _preds(dtype, layout, CLASSES), _empty(BATCH, ANCHORS, dtype=dtype), _preds(dtype, layout, 4)
    rows = (*_rows(BATCH * SLOTS), _empty(BATCH * SLOTS, 4))
    kernels.simota_assign(scores, objectness, boxes, _empty(ANCHORS, 2), _empty(ANCHORS), *rows, "center", 1.5)


def _yolox_assign(candidates: str, radius: float) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        working = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (*(_empty(ROWS, dtype=torch.int64) for _ in range(2)), *(_empty(ROWS, 4, dtype=working) for _ in range(2)))
        kernels.yolox_assign(_preds(dtype, layout, 5 + CLASSES), *rows, SHAPES, STRIDES, candidates, radius)

    return operator


def _yolox_loss(num_classes: int, iou_loss: str) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from triton_yolo import kernels

        working = torch.float64 if dtype == torch.float64 else torch.float32
        preds, counts, one = _preds(dtype, layout, 5 + num_classes), _empty(3, dtype=torch.int64), _empty(dtype=working)
        target_row, matched_iou = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(BATCH, ANCHORS, dtype=working)
        gt = (_empty(ROWS, dtype=torch.int64), _empty(ROWS, 4, dtype=working))
        args = (preds, target_row, matched_iou, counts, 1, *gt, SHAPES, STRIDES, iou_loss, 5.0, _empty())
        kernels.yolox_loss(*args)
        kernels.yolox_loss_backward(one, *args)

    return operator


OPERATORS: dict[str, Operator] = {
    "decode_dfl": (_decode(16, has_strides=True), LAYOUTS),
    "decode_dfl, R=7": (_decode(7, has_strides=False), LAYOUTS[:1]),
    "decode_dfl, R=32": (_decode(32, has_strides=False), LAYOUTS[:1]),
    "decode_dfl, R=1": (_decode(1, has_strides=False), LAYOUTS[:1]),
    **{f"bbox_iou, {kind}": (_bbox_iou(kind), LAYOUTS[-1:]) for kind in ("iou", "giou", "diou", "ciou")},
    "unpack_rows": (_unpack_rows, LAYOUTS[:1]),
    "yolo11_assign": (_assign(topk2=None, min_box_side=0.0), LAYOUTS),
    "yolo11_assign, topk2": (_assign(topk2=1, min_box_side=16.0), LAYOUTS[:1]),
    "yolo11_loss": (_loss(16, CLASSES, has_weights=False), LAYOUTS),
    "yolo11_loss, weights": (_loss(16, CLASSES, has_weights=True), LAYOUTS[:1]),
    "yolo11_loss, R=1, C=1": (_loss(1, 1, has_weights=False), LAYOUTS[:1]),
    "yolo11_loss, R=32": (_loss(32, 1203, has_weights=False), LAYOUTS[:1]),
    "task_aligned_assign": (_task_aligned_assign, LAYOUTS[-1:]),
    "align_metric, top-k": (_stages, LAYOUTS[-1:]),
    "decode_yolox": (_decode_yolox, LAYOUTS),
    "simota_assign": (_simota_assign, LAYOUTS[-1:]),
    "yolox_assign": (_yolox_assign("center", 1.5), LAYOUTS),
    "yolox_assign, box": (_yolox_assign("box_and_center", 2.5), LAYOUTS[:1]),
    "yolox_loss": (_yolox_loss(CLASSES, "iou"), LAYOUTS),
    "yolox_loss, GIoU": (_yolox_loss(CLASSES, "giou"), LAYOUTS[:1]),
    "yolox_loss, C=1": (_yolox_loss(1, "iou"), LAYOUTS[:1]),
}


# ---- compilation


class _Target(DriverBase):
    """A driver that only says what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

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


def compile_launches(target: str, function: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Run ``function`` and return (name, compiled kernel) of its launches, none of which runs."""
    launched = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        launched.append((kernel.__name__, compiled))
        return compiled

    with _active(target), mock.patch.object(triton.JITFunction, "run", compile_only):
        function()
    return launched


@contextmanager
def _active(target: str) -> Iterator[None]:
    backend, _, arch = target.partition(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    triton.runtime.driver.set_active(_Target(gpu))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("triton_yolo.kernels"):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()
    yield


# ---- reading what came out


def _usage(compiled: Any, target: str) -> tuple[int, int, int, int]:
    """Registers a thread, bytes spilled a thread, widest global load and store in bits."""
    if target.startswith("hip"):
        asm = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm).group(1))
        spill = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm).group(1))
        return registers, spill, _widest(r"(?:global|buffer)_load_(\w+)", asm), _widest(r"(?:global|buffer)_store_(\w+)", asm)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills = re.search(r"\b(STL|LDL)\b", sass) is not None
    spill = int(re.search(r"STACK:(\d+)", usage).group(1)) if spills else 0
    return registers, spill, _widest(r"\bLDG([.\w]*)", sass), _widest(r"\bSTG([.\w]*)", sass)


def _widest(pattern: str, assembly: str) -> int:
    found = [0]
    for suffix in re.findall(pattern, assembly):
        wide = re.search(r"(?<![A-Z])(32|64|128)\b|dwordx(\d)|(b128|b96|b64|b32|b16)", suffix)
        if wide is None:
            found.append(16 if re.search(r"U?S?16|short", suffix) else 8 if re.search(r"[US]8|byte", suffix) else 32)
        else:
            found.append(32 * int(wide[2]) if wide[2] else int(wide[1] or wide[3][1:]))
    return max(found)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    nvdisasm = tool.with_name("nvdisasm")
    command = [str(tool), option, path] if option == "-res-usage" or not nvdisasm.exists() else [str(nvdisasm), "-c", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
