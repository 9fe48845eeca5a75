"""The detection criterion and the assigner of Ultralytics, computed with this package's."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
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
MEMBERS = {
    "bce": (BCE,),
    "assigner": ("ultralytics.utils.tal.TaskAlignedAssigner",),
    "bbox_loss": ("ultralytics.utils.loss.BboxLoss",),
    "bbox_loss.dfl_loss": ("ultralytics.utils.loss.DFLoss", "builtins.NoneType"),  # one bin does without
}


Prepare = Callable[[Any, Mapping[str, Any], Mapping[str, Tensor]], tuple[torch.nn.Module, tuple[Any, ...]]]


def criterion_loss(owner: Any) -> Any:
    _COMPUTATION[:] = [Stock(owner, "loss", MEMBERS, settings)]
    return loss_by(owner, _difference, _prepare, ("box", "cls", "dfl"))


def loss_by(owner: Any, difference_of: Callable[[Any], str | None], prepare: Prepare, terms: Sequence[str]) -> Any:
    """What takes the place of a criterion's ``loss``: the stock one where something differs, else ours.

    ``prepare`` makes our criterion and its inputs; ``terms`` are those of its output in the order of the stock one's names.
    """
    stock = owner.loss

    @functools.wraps(stock)
    def loss(self: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            difference = difference_of(self)
            if difference:
                say_what_stays("ultralytics", type(self).__name__, difference)
                return stock(self, preds, batch)
            if isinstance(self.hyp, dict):
                raise TypeError(
                    "model.args must have the gains as attributes, as get_cfg() of Ultralytics makes it, got a dict"
                )
            names = self.loss_names
            criterion, inputs = prepare(self, preds, batch)
        except (AttributeError, KeyError) as error:
            raise unexpected(*subject(), f"the criterion's settings or inputs have changed: {error}") from error
        out = criterion(*inputs)
        return out.loss.reshape(1), {name: getattr(out, term) for name, term in zip(names, terms, strict=True)}

    return loss


def _prepare(stock: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[YOLO11Loss, tuple[Any, ...]]:
    dist, *others = inputs_of(preds, batch)
    return _criterion(stock, dist.device), (dist, *others)


def inputs_of(preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Sequence[int]], Tensor]:
    """Distances and class logits, sizes of the levels, and rows, as our criteria take them."""
    dist, scores = preds["boxes"], preds["scores"]
    shapes = [feature.shape[2:] for feature in preds["feats"]]
    columns = batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]
    rows = torch.cat([column.to(dist.device, working_dtype(dist.dtype)) for column in columns], 1)
    return dist.transpose(1, 2), scores.transpose(1, 2), shapes, rows


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


def settings(criterion: Any, bce: torch.nn.Module, assigner: Any, _: Any, dfl_loss: Any) -> dict[str, bool]:
    """Whether those of the members are stock."""
    reg_max = criterion.reg_max
    return {
        "bce": is_elementwise(bce),
        "use_dfl": criterion.use_dfl == (reg_max > 1),
        "bbox_loss.dfl_loss": (1 if dfl_loss is None else dfl_loss.reg_max) == reg_max,
        "assigner": assigner.eps == _EPS,
    }


def _criterion(stock: Any, device: torch.device) -> YOLO11Loss:
    """Our criterion with the settings that the stock one has at this moment; the trainer changes them as it goes."""
    return kept(_weighted, device, stock.class_weights, **options_of(stock))


def options_of(stock: Any) -> dict[str, Any]:
    """Those of our criterion, but for the weights of classes."""
    assigner, gains = stock.assigner, stock.hyp
    return {
        "num_classes": stock.nc,
        "strides": tuple(assigner.stride),
        "reg_max": stock.reg_max,
        "topk": assigner.topk,
        "topk2": _topk2(assigner),
        "alpha": assigner.alpha,
        "beta": assigner.beta,
        "box_gain": gains.box,
        "cls_gain": gains.cls,
        "dfl_gain": gains.dfl,
        "min_box_side": assigner.stride_val,
    }


def _weighted(class_weights: Tensor | None, **options: Any) -> YOLO11Loss:
    return YOLO11Loss(class_weights=flat(class_weights), **options)


def flat(class_weights: Tensor | None) -> Tensor | None:
    return None if class_weights is None else class_weights.reshape(-1)


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
