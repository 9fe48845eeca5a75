"""The detection criterion and the assigner of Ultralytics, computed with this package's."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple
from weakref import WeakSet

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
BY_ROW = ("batch_idx", "cls", "bboxes")
_EPS = 1e-9  # of the assigner; the criterion has it built in
MEMBERS = {
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
        make: makes ours of options.
        options: those that a stock criterion stands for at this moment; the trainer changes them as it goes.
        inputs: of predictions and batch, as ours takes them.
        terms: of our output, in the order of the stock one's names; one without a name is 0.
        objection: why the stock computation stays for some predictions.
        columns: what a stock criterion of ours reads of a batch, by name: with one row a box, and as large for every batch.
    """

    members: Mapping[str, tuple[str, ...]]
    settings: Callable[..., Mapping[str, bool]]
    make: Callable[..., Any]
    options: Callable[[Any], dict[str, Any]]
    inputs: Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, ...]]
    terms: tuple[str, ...]
    objection: Callable[[Mapping[str, Any]], str | None] = lambda preds: None
    columns: Callable[[Any], tuple[tuple[str, ...], tuple[str, ...]]] = lambda stock: (BY_ROW, ())


def settings(criterion: Any, bce: torch.nn.Module, assigner: Any, _: Any, dfl_loss: Any) -> dict[str, bool]:
    """Whether those of the members are stock."""
    reg_max = criterion.reg_max
    return {
        "bce": is_elementwise(bce),
        "use_dfl": criterion.use_dfl == (reg_max > 1),
        "proj": numbers(criterion.proj) == tuple(range(reg_max)),
        "class_weights": _is_by_class(criterion.class_weights, criterion.nc),
        "bbox_loss.dfl_loss": (1 if dfl_loss is None else dfl_loss.reg_max) == reg_max,
        "assigner": assigner.eps == _EPS,
    }


def _is_by_class(weights: Tensor | None, num_classes: int) -> bool:
    if weights is None:
        return True
    is_plain = weights.is_floating_point() and not weights.requires_grad
    return is_plain and weights.shape[-1:] == (num_classes,) and weights.numel() == num_classes


def numbers(x: Tensor) -> tuple[float, ...]:
    """What a criterion holds in a small tensor that hardly ever changes: read when it does, since that may synchronise."""
    return _read(x, None if x.is_inference() else x._version)


@functools.lru_cache
def _read(x: Tensor, version: int | None) -> tuple[float, ...]:
    return tuple(x.tolist())


def options_of(stock: Any) -> dict[str, Any]:
    """What every criterion of ours is set to."""
    assigner, gains = stock.assigner, stock.hyp
    return {
        "class_weights": stock.class_weights,
        "num_classes": stock.nc,
        "strides": numbers(stock.stride),
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


def inputs_of(preds: Mapping[str, Any], batch: Mapping[str, Tensor], *names: str) -> tuple[Any, ...]:
    """Predictions of these names, (B, A, channels), sizes of the levels, and rows, as our criteria take them."""
    parts = [preds[name].transpose(1, 2) for name in names]
    device, dtype = parts[0].device, working_dtype(parts[0].dtype)
    columns = batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]
    rows = torch.cat([column.to(device, dtype) for column in columns], 1)
    return *parts, [feature.shape[2:] for feature in preds["feats"]], rows


DETECTION = Adapter(
    MEMBERS, settings, YOLO11Loss, options_of, lambda preds, batch: inputs_of(preds, batch, "boxes", "scores"),
    ("box", "cls", "dfl"),
)  # fmt: skip
COMPUTATIONS: dict[type, tuple[Stock, Adapter]] = {}
"""By the class of a criterion, of those that are computed with ours."""
_OBJECTED: WeakSet[Any] = WeakSet()
"""Criteria whose predictions had an objection."""


class Constants(NamedTuple):
    """What a step with a criterion of ours depends on beside the numbers in tensors: names of its inputs, see ``Adapter``."""

    by_row: tuple[str, ...]
    by_image: tuple[str, ...]
    settings: tuple[Hashable, ...]


def criterion_loss(owner: Any, adapter: Adapter) -> Any:
    """What takes the place of a criterion's ``loss``: the stock one where something differs, else ours."""
    stock, computation = owner.loss, Stock(owner, "loss", adapter.members, adapter.settings)
    COMPUTATIONS[owner] = computation, adapter

    @functools.wraps(stock)
    def loss(self: Any, preds: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor] | Tensor]:
        try:
            difference = _difference(self, computation)
            if not difference and (difference := adapter.objection(preds)):
                _OBJECTED.add(self)
            if difference:
                say_what_stays("ultralytics", type(self).__name__, difference)
                return stock(self, preds, batch)
            if isinstance(self.hyp, dict):
                raise TypeError(
                    "model.args must have the gains as attributes, as get_cfg() of Ultralytics makes it, got a dict"
                )
            inputs = adapter.inputs(preds, batch)
            criterion = _criterion(self, adapter, inputs[0].device)
        except (AttributeError, KeyError) as error:
            raise unexpected(*subject(), f"the criterion's settings or inputs have changed: {error}") from error
        out = criterion(*inputs)
        terms = [getattr(out, term) if term else torch.zeros_like(out.box) for term in adapter.terms]
        names = getattr(self, "loss_names", None)  # older versions have numbers without names
        return out.loss.reshape(1), torch.stack(terms) if names is None else dict(zip(names, terms, strict=True))

    return loss


def _difference(criterion: Any, computation: Stock) -> str | None:
    """Why a criterion keeps its own computation, if it does."""
    return vars(criterion).get(KEEPS_STOCK) or computation.difference(criterion)


def constants(criterion: Any, device: torch.device) -> Constants | None:
    """Those of Ultralytics' criterion, with one branch or two of one kind; None if any of it is not ours."""
    try:
        is_branched = type(criterion) is getattr(modules()[1], "E2ELoss", None)
        branches = (criterion.one2many, criterion.one2one) if is_branched else (criterion,)
        kind = type(branches[0])
        if kind not in COMPUTATIONS:
            return None
        computation, adapter = COMPUTATIONS[kind]
        for branch in branches:
            if type(branch) is not kind or branch in _OBJECTED or _difference(branch, computation):
                return None
        weights = [value for value in vars(criterion).values() if isinstance(value, float)]
        return Constants(*adapter.columns(branches[0]), (*[_criterion(x, adapter, device) for x in branches], *weights))
    except AttributeError:
        return None  # the loss itself says what is wrong


def _criterion(stock: Any, adapter: Adapter, device: torch.device) -> Any:
    """Our criterion with the settings that the stock one has at this moment."""
    return kept(_weighted, device, adapter.make, **adapter.options(stock))


def _weighted(make: Callable[..., Any], *, class_weights: Tensor | None, **options: Any) -> Any:
    """Make a criterion with weights of classes in the stock one's shape."""
    return make(class_weights=None if class_weights is None else class_weights.reshape(-1), **options)


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
