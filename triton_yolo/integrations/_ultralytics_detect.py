"""The detection criterion and the assigner of Ultralytics, computed with this package's."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._precision import working_dtype
from ..assigners import TaskAlignedAssigner
from ..losses import YOLO11Loss
from ._patching import kept, unexpected
from ._stock import BCE, Stock, is_elementwise, say_what_stays
from ._ultralytics_version import modules, subject

ASSIGNER_INPUTS = ("pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes", "mask_gt")
KEEPS_STOCK = "_triton_yolo_keeps_stock"
"""Attribute of a criterion: why."""
_EPS = 1e-9  # of the assigner; the criterion has it built in
_MEMBERS = {
    "bce": (BCE,),
    "assigner": ("ultralytics.utils.tal.TaskAlignedAssigner",),
    "bbox_loss": ("ultralytics.utils.loss.BboxLoss",),
    "bbox_loss.dfl_loss": ("ultralytics.utils.loss.DFLoss", "builtins.NoneType"),  # one bin does without
}


class Adapter(NamedTuple):
    """How a criterion of Ultralytics is computed with ours.

    Attributes:
        members: full names of the classes that its members have, see ``Stock``.
        settings: whether what these hold is stock, see there.
        inputs: the predictions that ours takes, by the names that Ultralytics' heads give them.
        make: makes ours of settings.
        more_gains: names of gains beside those of boxes, classes and distances.
    """

    members: Mapping[str, tuple[str, ...]]
    settings: Callable[..., Mapping[str, bool]]
    inputs: tuple[str, ...]
    make: Callable[..., Any]
    more_gains: tuple[str, ...] = ()


def settings(criterion: Any, bce: torch.nn.Module, assigner: Any, _: Any, dfl_loss: Any) -> dict[str, bool]:
    reg_max = criterion.reg_max
    return {
        "bce": is_elementwise(bce),
        "use_dfl": criterion.use_dfl == (reg_max > 1),
        "bbox_loss.dfl_loss": (1 if dfl_loss is None else dfl_loss.reg_max) == reg_max,
        "assigner": assigner.eps == _EPS,
    }


DETECTION = Adapter(_MEMBERS, settings, ("boxes", "scores"), YOLO11Loss)
_COMPUTATIONS: dict[type, tuple[Stock, Adapter]] = {}
"""By the class of a criterion."""


def criterion_loss(owner: Any, adapter: Adapter) -> Any:
    stock, computation = owner.loss, Stock(owner, "loss", adapter.members, adapter.settings)
    _COMPUTATIONS[owner] = computation, adapter

    @functools.wraps(stock)
    def loss(self: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            difference = _difference(self, computation)
            if difference:
                say_what_stays("ultralytics", type(self).__name__, difference)
                return stock(self, preds, batch)
            if isinstance(self.hyp, dict):
                raise TypeError(
                    "model.args must have the gains as attributes, as get_cfg() of Ultralytics makes it, got a dict"
                )
            parts = [preds[name] for name in adapter.inputs]
            dist = parts[0]
            criterion, names = _criterion(self, adapter, dist.device), self.loss_names
            shapes = [feature.shape[2:] for feature in preds["feats"]]
            columns = batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]
        except (AttributeError, KeyError) as error:
            raise unexpected(*subject(), f"the criterion's settings or inputs have changed: {error}") from error
        rows = torch.cat([column.to(dist.device, working_dtype(dist.dtype)) for column in columns], 1)
        out = criterion(*[part.transpose(1, 2) for part in parts], shapes, rows)
        return out.loss.reshape(1), dict(zip(names, out[1:-1], strict=True))

    return loss


def _difference(criterion: Any, computation: Stock) -> str | None:
    """Why a criterion keeps its own computation, if it does."""
    return vars(criterion).get(KEEPS_STOCK) or computation.difference(criterion)


def constants(criterion: Any, device: torch.device) -> Hashable | None:
    """What a loss of ours reads of Ultralytics' criterion, with one branch or two; None if any of it is not ours."""
    losses = modules()[1]
    try:
        is_branched = type(criterion) is getattr(losses, "E2ELoss", None)
        branches = (criterion.one2many, criterion.one2one) if is_branched else (criterion,)
        ours = []
        for branch in branches:
            computation, adapter = _COMPUTATIONS.get(type(branch), (None, None))
            if computation is None or adapter is None or _difference(branch, computation):
                return None
            ours.append(_criterion(branch, adapter, device))
        return *ours, *[value for value in vars(criterion).values() if isinstance(value, float)]
    except AttributeError:
        return None  # the loss itself says what is wrong


def _criterion(stock: Any, adapter: Adapter, device: torch.device) -> Any:
    """Our criterion with the settings that the stock one has at this moment; the trainer changes them as it goes."""
    assigner, gains, weights = stock.assigner, stock.hyp, stock.class_weights
    return kept(
        _weighted,
        device,
        adapter.make,
        weights,
        num_classes=stock.nc,
        strides=tuple(assigner.stride),
        reg_max=stock.reg_max,
        topk=assigner.topk,
        topk2=_topk2(assigner),
        alpha=assigner.alpha,
        beta=assigner.beta,
        box_gain=gains.box,
        cls_gain=gains.cls,
        dfl_gain=gains.dfl,
        min_box_side=assigner.stride_val,
        **{f"{name}_gain": getattr(gains, name) for name in adapter.more_gains},
    )


def _weighted(make: Callable[..., Any], class_weights: Tensor | None, **settings: Any) -> Any:
    return make(class_weights=None if class_weights is None else class_weights.reshape(-1), **settings)


def assigner_forward(owner: Any) -> Any:
    stock, computation = owner.forward, Stock(owner, "forward", {}, lambda assigner: {})

    @functools.wraps(stock)
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        difference = computation.difference(self)
        if difference:
            say_what_stays("ultralytics", type(self).__name__, difference)
            return stock(self, *args, **kwargs)
        try:
            settings = self.topk, self.num_classes, self.alpha, self.beta, self.eps, _topk2(self), self.stride_val
        except AttributeError as error:
            raise unexpected(*subject(), f"the assigner's settings have changed: {error}") from error
        return tuple(kept(TaskAlignedAssigner, None, *settings)(*args, **kwargs))

    return forward


def _topk2(assigner: Any) -> int | None:
    """The second top-k; Ultralytics repeats the first one where there is none."""
    return assigner.topk2 if assigner.topk2 < assigner.topk else None
