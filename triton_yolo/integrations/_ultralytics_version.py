"""Which Ultralytics is installed, and whether it is what the adapter was written for."""

import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

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
def compare_losses(owner: Any, ours: Any) -> None:
    """Compare with a criterion's stock loss, and its gradient, on random numbers: an untested version may define another."""
    is_oriented = owner.__name__ == "v8OBBLoss"
    for reg_max in (16, 1):
        stock = _stock_criterion(owner, reg_max)
        leaves, preds, batch = _random_inputs(reg_max, is_oriented=is_oriented)
        results: list[list[torch.Tensor]] = []
        forms = set()
        for method in (owner.loss, ours):
            with torch.autocast("cpu", enabled=False):
                total, items = method(stock, preds, batch)
                grads = torch.autograd.grad(total.sum(), leaves, allow_unused=True, materialize_grads=True)
            forms.add(tuple(items) if isinstance(items, Mapping) else len(items))
            results.append([*grads, total.sum().detach(), *(items.values() if isinstance(items, Mapping) else items)])
        require_here(len(forms) == 1, f"its loss items are {' and '.join(map(str, forms))}")
        for expected, actual in zip(*results, strict=True):
            require_here(torch.allclose(actual, expected, 1e-3, 1e-3 * float(expected.abs().max())), "its loss is another")


def _random_inputs(reg_max: int, *, is_oriented: bool) -> tuple[list[torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """Leaves, predictions and targets of two images of 128 px, for every task."""
    generator = torch.Generator().manual_seed(0)
    leaves = {
        "boxes": torch.rand(2, 4 * reg_max, 336, generator=generator) * 3,
        "scores": torch.randn(2, 3, 336, generator=generator),
        "kpts": torch.randn(2, 17 * 3, 336, generator=generator),
        "mask_coefficient": torch.randn(2, 8, 336, generator=generator),
        "angle": torch.rand(2, 1, 336, generator=generator),
        "proto": torch.randn(2, 8, 32, 32, generator=generator),
    }
    preds = {**leaves, "feats": [torch.zeros(2, 1, *shape) for shape in ((16, 16), (8, 8), (4, 4))]}
    low = torch.rand(6, 2, generator=generator) * 0.4
    size = torch.rand(6, 2, generator=generator) * 0.4 + 0.1
    batch = {
        "batch_idx": torch.arange(6.0) // 3,
        "cls": torch.arange(6.0)[:, None] % 3,
        "bboxes": torch.cat([low + size / 2, size, torch.rand(6, 1, generator=generator)[:, : int(is_oriented)]], 1),
        "keypoints": torch.rand(6, 17, 3, generator=generator).round(decimals=1),
        "masks": torch.randint(4, (2, 32, 32), generator=generator),
    }
    return [x.requires_grad_() for x in leaves.values()], preds, batch


def _stock_criterion(owner: Any, reg_max: int) -> Any:
    head = SimpleNamespace(
        stride=torch.tensor([8.0, 16.0, 32.0]), nc=3, no=3 + 4 * reg_max, reg_max=reg_max, kpt_shape=[17, 3]
    )  # fmt: skip
    gains = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, pose=12.0, kobj=1.0, angle=1.0, overlap_mask=True)
    model = torch.nn.Linear(1, 1)
    model.args, model.model = gains, [head]  # type: ignore[assignment]
    return owner(model)


def require_here(condition: bool, what: str) -> None:
    require(*subject(), condition, what)


def subject() -> tuple[str, str]:
    """What the adapter is for, as errors name it."""
    return f"ultralytics {sys.modules['ultralytics'].__version__}", tested()


def tested() -> str:
    return TESTED[0] if TESTED[0] == TESTED[1] else "{} to {}".format(*TESTED)
