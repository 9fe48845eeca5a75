"""Which Ultralytics is installed, and whether it is what the adapter was written for."""

import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ._patching import import_trainer, require

TESTED = ("8.4.190", "8.4.190")


def modules() -> tuple[str, Any, Any, Any]:
    names = ("ultralytics", "ultralytics.utils.loss", "ultralytics.utils.tal", "ultralytics.utils.dist")
    package, losses, assigners, launcher = import_trainer("ultralytics", *names)
    return package.__version__, losses, assigners, launcher


def require_parameters(module: Any, owner: str, name: str, parameters: tuple[str, ...]) -> None:
    method = vars(getattr(module, owner, object)).get(name)
    found = tuple(inspect.signature(method).parameters)[: len(parameters)] if callable(method) else None
    require_here(found == parameters, f"{owner}.{name} takes {found}, expected {parameters}")


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@torch.inference_mode(False)
@torch.enable_grad()
def compare_losses(ours: Any, of_segments: Any) -> None:
    """Compare with the stock losses, and their gradients, on random numbers: an untested version may define others."""
    losses, generator = modules()[1], torch.Generator().manual_seed(0)
    for reg_max in (16, 1):
        _compare(losses.v8DetectionLoss, ours, reg_max, generator, {}, {})
    preds = {
        "mask_coefficient": torch.randn(2, 8, 336, generator=generator),
        "proto": torch.randn(2, 8, 32, 32, generator=generator),
    }
    masks = torch.randint(4, (2, 32, 32), generator=generator)
    _compare(losses.v8SegmentationLoss, of_segments, 16, generator, preds, {"masks": masks})


def _compare(
    owner: Any, ours: Any, reg_max: int, generator: torch.Generator, preds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> None:
    """Compare one criterion, with what it takes beside boxes and classes."""
    shapes = [(16, 16), (8, 8), (4, 4)]
    leaves = {
        "boxes": torch.rand(2, 4 * reg_max, 336, generator=generator) * 3,
        "scores": torch.randn(2, 3, 336, generator=generator),
        **preds,
    }
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    inputs = {**leaves, "feats": [torch.zeros(2, 1, *shape) for shape in shapes]}
    low = torch.rand(6, 2, generator=generator) * 0.4
    size = torch.rand(6, 2, generator=generator) * 0.4 + 0.1
    boxes = torch.cat([low + size / 2, size], 1)
    targets = {"batch_idx": torch.arange(6.0) // 3, "cls": torch.arange(6.0)[:, None] % 3, "bboxes": boxes, **batch}
    stock, results = _stock_criterion(owner, reg_max), []
    for method in (owner.loss, ours):
        with torch.autocast("cpu", enabled=False):
            total, items = method(stock, inputs, targets)
            grads = torch.autograd.grad(total.sum(), list(leaves.values()))
        require_here(isinstance(items, Mapping), f"its loss items are a {type(items).__name__}, expected a mapping")
        results.append([*grads, total.sum().detach(), *items.values()])
    for expected, actual in zip(*results, strict=True):
        require_here(torch.allclose(actual, expected, 1e-3, 1e-3 * float(expected.abs().max())), "its loss is another")


def _stock_criterion(owner: Any, reg_max: int) -> Any:
    head = SimpleNamespace(stride=torch.tensor([8.0, 16.0, 32.0]), nc=3, no=3 + 4 * reg_max, reg_max=reg_max)
    model = torch.nn.Linear(1, 1)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, overlap_mask=True)  # type: ignore[assignment]
    model.model = [head]  # type: ignore[assignment]
    return owner(model)


def require_here(condition: bool, what: str) -> None:
    require(*subject(), condition, what)


def subject() -> tuple[str, str]:
    """What the adapter is for, as errors name it."""
    return f"ultralytics {sys.modules['ultralytics'].__version__}", tested()


def tested() -> str:
    return TESTED[0] if TESTED[0] == TESTED[1] else "{} to {}".format(*TESTED)
