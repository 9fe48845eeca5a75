"""The detection criterion and the assigner of Ultralytics, computed with this package's."""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

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


def criterion_loss(owner: Any) -> Any:
    stock, _COMPUTATION[:] = owner.loss, [Stock(owner, "loss", _MEMBERS, _settings)]

    @functools.wraps(stock)
    def loss(self: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            difference = _difference(self)
            if difference:
                say_what_stays("ultralytics", type(self).__name__, difference)
                return stock(self, preds, batch)
            if isinstance(self.hyp, dict):
                raise TypeError(
                    "model.args must have the gains as attributes, as get_cfg() of Ultralytics makes it, got a dict"
                )
            dist, scores = preds["boxes"], preds["scores"]
            criterion, names = _criterion(self, dist.device), self.loss_names
            shapes = [feature.shape[2:] for feature in preds["feats"]]
            columns = batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]
        except (AttributeError, KeyError) as error:
            raise unexpected(*subject(), f"the criterion's settings or inputs have changed: {error}") from error
        rows = torch.cat([column.to(dist.device, working_dtype(dist.dtype)) for column in columns], 1)
        out = criterion(dist.transpose(1, 2), scores.transpose(1, 2), shapes, rows)
        return out.loss.reshape(1), dict(zip(names, (out.box, out.cls, out.dfl), strict=True))

    return loss


_COMPUTATION: list[Stock] = []


def _difference(criterion: Any) -> str | None:
    """Why a detection criterion keeps its own computation, if it does."""
    return vars(criterion).get(KEEPS_STOCK) or _COMPUTATION[0].difference(criterion)


def constants(criterion: Any, device: torch.device) -> Hashable | None:
    """What a loss of ours reads of Ultralytics' criterion, with one branch or two; None if any of it is not ours."""
    losses = modules()[1]
    try:
        is_branched = type(criterion) is getattr(losses, "E2ELoss", None)
        branches = (criterion.one2many, criterion.one2one) if is_branched else (criterion,)
        if not all(type(branch) is losses.v8DetectionLoss and _difference(branch) is None for branch in branches):
            return None
        weights = [value for value in vars(criterion).values() if isinstance(value, float)]
        return *[_criterion(branch, device) for branch in branches], *weights
    except AttributeError:
        return None  # the loss itself says what is wrong


def _settings(criterion: Any, bce: torch.nn.Module, assigner: Any, _: Any, dfl_loss: Any) -> dict[str, bool]:
    reg_max = criterion.reg_max
    return {
        "bce": is_elementwise(bce),
        "use_dfl": criterion.use_dfl == (reg_max > 1),
        "bbox_loss.dfl_loss": (1 if dfl_loss is None else dfl_loss.reg_max) == reg_max,
        "assigner": assigner.eps == _EPS,
    }


def _criterion(stock: Any, device: torch.device) -> YOLO11Loss:
    """Our criterion with the settings that the stock one has at this moment; the trainer changes them as it goes."""
    assigner, gains, weights = stock.assigner, stock.hyp, stock.class_weights
    return kept(
        _weighted,
        device,
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
    )


def _weighted(class_weights: Tensor | None, **settings: Any) -> YOLO11Loss:
    return YOLO11Loss(class_weights=None if class_weights is None else class_weights.reshape(-1), **settings)


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
