"""The implementations of a criterion, each on predictions in the layout native to it."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import reference
import triton_yolo as ty

from . import peers
from .cases import STRIDES, Case, yolo11_preds, yolox_preds
from .systems import SYSTEMS, least_bytes

OURS = "triton_yolo"
MIN_BOX_SIDE = float(STRIDES[1])  # as in Ultralytics
_ASSIGNED = 8 + 16 + 1 + 8  # bytes an anchor of what the task-aligned assigner returns: label, box, is foreground, index
_MATCHED = 1 + 8 + 4  # of SimOTA: is foreground, index, IoU


class Step(NamedTuple):
    """What is timed: ``forward`` returns a tensor; if there are ``leaves``, a gradient of ones goes back to them.

    ``least_bytes`` is what both must move, 0 where that is not said.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    device: torch.device
    least_bytes: int = 0

    def backward(self, out: Tensor) -> None:
        if self.leaves:
            out.backward(torch.ones((), dtype=out.dtype, device=out.device).expand_as(out))


class Target(NamedTuple):
    """Where and in which type predictions are; before, they are rounded to ``rounded_to``."""

    device: torch.device
    dtype: torch.dtype
    rounded_to: torch.dtype | None = None

    def place(self, preds: Tensor) -> Tensor:
        return preds.detach().to(self.device, self.rounded_to or self.dtype).to(self.dtype)

    def leaf(self, preds: Tensor) -> Tensor:
        return self.place(preds).contiguous().requires_grad_()


def compiled(function: Any, is_compiled: bool) -> Any:
    return torch.compile(function) if is_compiled else function


def graphed(build: Callable[[Case, Target], Step], case: Case, target: Target) -> Step:
    """Forward and backward captured in a CUDA graph; its replay counts as forward."""
    if target.device.type != "cuda":
        raise RuntimeError("a CUDA graph needs --device cuda")
    step, stream, graph = build(case, target), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def both() -> Tensor:
        for leaf in step.leaves:
            leaf.grad = None
        out = step.forward()
        step.backward(out)
        return out

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = both()

    def replay() -> Tensor:
        graph.replay()
        return out

    return Step(replay, (), target.device, step.least_bytes)


def step_of(system: str, criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    """A criterion that is called as ours of the name, on the head's own layout."""
    preds, maps, truth = SYSTEMS[system].inputs(case)
    leaves, maps = tuple(map(target.leaf, preds)), tuple(map(target.leaf, maps))
    truth = tuple(x.to(target.device) for x in truth)

    def forward() -> Tensor:
        return criterion(*(x.transpose(1, 2) for x in leaves), *maps, case.feat_shapes, *truth).loss

    return Step(forward, (*leaves, *maps), target.device, least_bytes(system, case, target.dtype.itemsize))


def ours(system: str, case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = SYSTEMS[system].criterion(case, min_box_side=MIN_BOX_SIDE)
    return step_of(system, compiled(criterion, is_compiled), case, target)


def _yolo11_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = compiled(reference.yolo11_loss, is_compiled)
    options = {"strides": STRIDES, "reg_max": case.reg_max, "min_box_side": MIN_BOX_SIDE}
    return step_of("yolo11", partial(criterion, **options), case, target)


def _yolo11_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n.yaml", case.num_classes).to(target.device).init_criterion()
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    batch = peers.ultralytics_batch(case.rows.to(target.device))
    preds = peers.ultralytics_preds(*leaves, case.feat_shapes)
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves, target.device)


def _yolo11_libreyolo(case: Case, target: Target) -> Step:
    """Its YOLOv9, with another rule for candidates."""
    criterion = peers.libreyolo_yolo9_criterion(case.num_classes, case.reg_max, STRIDES, case.imgsz, target.device)
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    targets = peers.libreyolo_targets(case.rows, case.batch_size).to(target.device)

    def forward() -> Tensor:
        maps = peers.libreyolo_maps(*leaves, case.feat_shapes)
        return case.batch_size * criterion(maps, targets)["total_loss"]

    return Step(forward, leaves, target.device)


def _yolox(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    preds, rows = target.leaf(yolox_preds(case)), case.rows.to(target.device)
    least = least_bytes("yolox", case, target.dtype.itemsize)
    return Step(lambda: criterion(preds, case.feat_shapes, rows).loss, (preds,), target.device, least)


def _yolox_ours(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = SYSTEMS["yolox"].criterion(case).to(target.device)
    return _yolox(compiled(criterion, is_compiled), case, target)


def _yolox_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    return _yolox(partial(compiled(reference.yolox_loss, is_compiled), strides=STRIDES), case, target)


def _yolox_peer(make_head: Callable[[int, tuple[int, ...]], nn.Module], case: Case, target: Target) -> Step:
    head = make_head(case.num_classes, STRIDES).to(target.device)
    preds = target.leaf(yolox_preds(case))
    labels = peers.yolox_labels(case.rows, case.batch_size, (case.imgsz, case.imgsz)).to(target.device)
    return Step(lambda: peers.yolox_losses(head, preds, case.feat_shapes, labels)[0], (preds,), target.device)


CRITERIA: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "yolo11": {
        OURS: partial(ours, "yolo11"),
        "ultralytics": _yolo11_ultralytics,
        "libreyolo": _yolo11_libreyolo,
        "reference": _yolo11_reference,
        "torch.compile(reference)": partial(_yolo11_reference, is_compiled=True),
        f"torch.compile({OURS})": partial(ours, "yolo11", is_compiled=True),
        f"CUDA graph of {OURS}": partial(graphed, partial(ours, "yolo11")),
    },
    "yolox": {
        OURS: _yolox_ours,
        "pixeltable-yolox": partial(_yolox_peer, peers.yolox_head),
        "libreyolo": partial(_yolox_peer, peers.libreyolo_yolox_head),
        "reference": _yolox_reference,
        "torch.compile(reference)": partial(_yolox_reference, is_compiled=True),
        f"torch.compile({OURS})": partial(_yolox_ours, is_compiled=True),
        f"CUDA graph of {OURS}": partial(graphed, _yolox_ours),
    },
}


class Padded(NamedTuple):
    """What an assigner takes, with the predictions of a network that has learnt something."""

    cls_logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    gt: tuple[Tensor, Tensor, Tensor]


def padded(case: Case, target: Target) -> Padded:
    dist, logits = (target.place(x).transpose(1, 2) for x in yolo11_preds(case))
    points, strides = (x.to(target.device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    boxes = ty.decode_dfl(dist, points, reg_max=case.reg_max, strides=strides)
    labels, xywh, mask = reference.pad_targets(case.rows.to(target.device), case.batch_size, (case.imgsz, case.imgsz))
    gt = (labels[..., None], reference.xywh_to_xyxy(xywh), mask[..., None])
    return Padded(logits, boxes, points * strides[:, None], strides, gt)


def _task_aligned(assigner: Callable[..., tuple[Tensor, ...]], case: Case, target: Target) -> Step:
    x = padded(case, target)
    args = (x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt)
    least = x.boxes.nbytes + x.boxes[..., 0].numel() * (_ASSIGNED + 4 * case.num_classes)
    return Step(lambda: assigner(*args)[2], (), target.device, least)


def _task_aligned_ours(case: Case, target: Target) -> Step:
    return _task_aligned(ty.TaskAlignedAssigner(10, case.num_classes, 0.5, 6.0, min_box_side=MIN_BOX_SIDE), case, target)


def _task_aligned_reference(case: Case, target: Target) -> Step:
    return _task_aligned(
        partial(reference.task_aligned_assign, topk=10, alpha=0.5, beta=6.0, min_box_side=MIN_BOX_SIDE), case, target
    )


def _task_aligned_ultralytics(case: Case, target: Target) -> Step:
    return _task_aligned(peers.ultralytics_assigner(case.num_classes, topk=10, alpha=0.5, beta=6.0), case, target)


def _simota(assigner: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    x = padded(case, target)
    args = (x.cls_logits, x.cls_logits.amax(-1), x.boxes, x.points, x.strides, *x.gt)
    least = x.boxes.nbytes + x.cls_logits.nbytes + x.boxes[..., 0].numel() * _MATCHED
    return Step(lambda: assigner(*args).matched_iou, (), target.device, least)


def _simota_ours(case: Case, target: Target) -> Step:
    return _simota(ty.SimOTAAssigner(case.num_classes), case, target)


def _simota_reference(case: Case, target: Target) -> Step:
    return _simota(reference.simota_assign, case, target)


ASSIGNERS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "TaskAlignedAssigner": {
        OURS: _task_aligned_ours,
        "ultralytics": _task_aligned_ultralytics,
        "reference": _task_aligned_reference,
    },
    "SimOTAAssigner": {OURS: _simota_ours, "reference": _simota_reference},
}


def label(name: str) -> str:
    """The name with the version if it is a package; of this one the version that runs, whatever was installed when."""
    if name == OURS:
        return f"{name} {ty.__version__}"
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
