"""Whole training steps, with the criterion that a model comes with and with ours: the time of the loss among the rest."""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import reference
import triton_yolo as ty
from triton_yolo.graphs import GraphedStep
from triton_yolo.integrations import ultralytics as integration

from . import peers, results
from .cases import STRIDES, Case
from .compare import TOLERANCE, check
from .competitors import OURS, Target, label
from .loss import case_of, describe, sizes
from .measure import Trial, interleaved, now, spread
from .network import Network

HEADER = (
    "| model | criterion | step ms (p20-p80) | model forward ms | loss ms (forward + backward) | model backward ms "
    "| optimiser ms | share of the loss | host gap |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|"
)
PROFILED = 5  # steps
GRAPHED = "cuda"  # the devices on which steps are replayed
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a profiler's trace


class Parts(NamedTuple):
    """Seconds of one step, the device synchronised after every part."""

    model_forward: float
    loss_forward: float
    loss_backward: float
    model_backward: float
    optimizer: float


class TrainStep(NamedTuple):
    """One training step of a model with a criterion: the outputs of its head, and the loss of them.

    The learning rate is 0, so every step is the first one: the same work on the same weights.
    """

    outputs: Callable[[], Sequence[Tensor]]
    loss: Callable[[Sequence[Tensor]], Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    graphed: Callable[[], Tensor] | None = None  # the loss of a step that is replayed, which has no parts

    @property
    def device(self) -> torch.device:
        return self.images.device

    def whole(self) -> tuple[float, float]:
        """The step as a trainer runs it: loss and seconds."""
        with self.context():
            start = now(self.device)
            loss = self.graphed() if self.graphed else self.loss(self.outputs())
            loss.backward()
            self.update()
            return loss.item(), now(self.device) - start

    def split(self) -> Parts:
        """The same, cut at the outputs of the head."""
        with self.context():
            times = [now(self.device)]
            outputs = self.outputs()
            times.append(now(self.device))
            leaves = [x.detach().requires_grad_() for x in outputs]
            loss = self.loss(leaves)
            times.append(now(self.device))
            loss.backward()
            times.append(now(self.device))
            torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
            times.append(now(self.device))
            self.update()
            times.append(now(self.device))
        return Parts(*(end - start for start, end in itertools.pairwise(times)))

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(arguments: argparse.Namespace) -> None:
    boxes, case = case_of(arguments)
    print(describe(case, boxes, arguments))
    builders = {what: build for what, build in MODELS.items() if not arguments.what or what in arguments.what}
    if "yolo11n" in builders and not peers.is_installed("ultralytics"):
        del builders["yolo11n"]
        print("yolo11n is left out: ultralytics is not installed\n")
    if not arguments.device.startswith("cuda"):
        print("the host gap is left out: it is taken on CUDA devices\n")
    print(HEADER)
    rounds, tolerance = 3 if arguments.quick else arguments.rounds, TOLERANCE[arguments.dtype]
    for what, build in builders.items():
        steps = build(case, Target(torch.device(arguments.device), getattr(torch, arguments.dtype)))
        for row in measure(what, steps, rounds, tolerance):
            print(markdown(row), flush=True)
            results.append("train-step", {**sizes(case, boxes, arguments), **row}, arguments.out)


def measure(what: str, steps: Mapping[str, TrainStep], rounds: int, tolerance: float) -> list[dict[str, Any]]:
    """A row for each criterion, with raw seconds; only one, with the reason, if their losses disagree."""
    losses = {name: step.whole()[0] for name, step in steps.items()}
    for name, loss in losses.items():
        if failure := check(Trial(loss), losses[OURS], tolerance).failure:
            return [{"what": what, "name": label(name), "failure": failure}]
    timings = _time(what, steps, rounds)
    return [
        {"what": what, "name": label(name), "failure": None, "result": losses[name], **timings[name], "busy": _busy(step)}
        for name, step in steps.items()
    ]


def markdown(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['what']} | {row['name']} | {row['failure']} |||||||"
    step, p20, p80 = spread(row["step"])
    gap = f"{1 - row['busy'] / step:.0%}" if row["busy"] else ""
    head = f"| {row['what']} | {row['name']} | {1e3 * step:.1f} ({1e3 * p20:.1f}-{1e3 * p80:.1f})"
    if Parts._fields[0] not in row:
        return f"{head} |  |  |  |  |  | {gap} |"
    parts = [Parts(*seconds) for seconds in zip(*(row[part] for part in Parts._fields), strict=True)]
    loss = [part.loss_forward + part.loss_backward for part in parts]
    share = spread([seconds / sum(part) for seconds, part in zip(loss, parts, strict=True)])[0]
    forward, loss_forward, loss_backward, backward, optimizer = (1e3 * spread(row[part])[0] for part in Parts._fields)
    return (
        f"{head} | {forward:.1f} | {1e3 * spread(loss)[0]:.1f} ({loss_forward:.1f} + {loss_backward:.1f}) "
        f"| {backward:.1f} | {optimizer:.1f} | {share:.1%} | {gap} |"
    )


def busy_seconds(trace: Mapping[str, Any]) -> float:
    """Time in which anything runs on the device, from a profiler's trace; streams overlap."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("cat") in _ON_DEVICE)
    busy = latest = 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, latest))
        latest = max(latest, end)
    return 1e-6 * busy


def _time(what: str, steps: Mapping[str, TrainStep], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of whole steps and, but for replayed ones, of every part, by criterion."""

    def once(step: TrainStep) -> dict[str, float]:
        whole = {"step": step.whole()[1]}
        return whole if step.graphed else {**whole, **step.split()._asdict()}

    for step in steps.values():
        once(step)
    timings: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    for name in tqdm(interleaved(steps, rounds), what, rounds * len(steps), leave=False, disable=None):
        for part, seconds in once(steps[name]).items():
            timings[name].setdefault(part, []).append(seconds)
    return timings


def _busy(step: TrainStep) -> float | None:
    """Seconds of a step in which the GPU works. Only its own events are recorded, which slows the host the least."""
    if step.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step.whole()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return busy_seconds(json.loads(file.read_text())) / PROFILED


def _yolo11n(case: Case, target: Target) -> dict[str, TrainStep]:
    """Ultralytics' own model; both criteria run under autocast, as in its trainer."""
    torch.manual_seed(0)
    model = peers.ultralytics_model("yolo11n.yaml", case.num_classes).to(target.device, _weights(target))
    criterion, batch = model.init_criterion(), peers.ultralytics_batch(case.rows.to(target.device))

    def loss(outputs: Sequence[Tensor]) -> Tensor:
        with _autocast(target):
            return criterion(peers.ultralytics_preds(*outputs, case.feat_shapes), batch)[0].sum()

    stock = _step(model, lambda preds: (preds["boxes"], preds["scores"]), loss, case, target)
    ours = stock._replace(context=integration.patched)
    return {"ultralytics": stock, OURS: ours, **_graphed(ours, case, model)}


def _detector(head: str, case: Case, target: Target) -> dict[str, TrainStep]:
    """The small one of this folder; the criteria stay outside autocast."""
    torch.manual_seed(0)
    of_yolo11 = head == "yolo11"
    channels = (4 * case.reg_max, case.num_classes) if of_yolo11 else (5 + case.num_classes,)
    model = Network(*channels).to(target.device, _weights(target))
    rows = case.rows.to(target.device, _weights(target))
    plain = partial(reference.yolo11_loss if of_yolo11 else reference.yolox_loss, strides=STRIDES)
    ours = (ty.YOLO11Loss if of_yolo11 else ty.YOLOXLoss)(case.num_classes, strides=STRIDES).to(target.device)

    def loss(criterion: Callable[..., NamedTuple], outputs: Sequence[Tensor]) -> Tensor:
        return criterion(*(x.transpose(1, 2) for x in outputs), case.feat_shapes, rows).loss

    before = _step(model, tuple, partial(loss, plain), case, target)
    after = before._replace(loss=partial(loss, ours))
    return {"reference": before, OURS: after, **_graphed(after, case, model, ours)}


def _graphed(ours: TrainStep, case: Case, *modules: nn.Module) -> dict[str, TrainStep]:
    """The same step replayed, on a GPU. Its inputs are copied every time as in a training, though they stay the same."""
    if ours.device.type != GRAPHED:
        return {}
    rows = case.rows.to(ours.device)
    step = GraphedStep(lambda *_: ours.loss(ours.outputs()), *modules, warmup=1)
    return {f"CUDA graph of {OURS}": ours._replace(graphed=lambda: step(ours.images, rows))}


def _step(
    model: nn.Module,
    heads: Callable[[Any], Sequence[Tensor]],
    loss: Callable[[Sequence[Tensor]], Tensor],
    case: Case,
    target: Target,
) -> TrainStep:
    images = torch.rand(case.batch_size, 3, case.imgsz, case.imgsz).to(target.device, _weights(target))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def outputs() -> Sequence[Tensor]:
        with _autocast(target):
            return heads(model(images))

    return TrainStep(outputs, loss, optimizer, images)


def _weights(target: Target) -> torch.dtype:
    return target.dtype if target.dtype == torch.float64 else torch.float32


def _autocast(target: Target) -> torch.autocast:
    return torch.autocast(target.device.type, target.dtype, enabled=target.dtype != _weights(target))


MODELS: dict[str, Callable[[Case, Target], dict[str, TrainStep]]] = {
    "yolo11n": _yolo11n,
    "detector-yolo11": partial(_detector, "yolo11"),
    "detector-yolox": partial(_detector, "yolox"),
}
