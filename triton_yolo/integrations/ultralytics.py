"""Ultralytics' trainers with this package's loss and assignment: ``patch()`` before ``YOLO(...).train(...)``.

What changes is how two methods compute: the detection criterion's loss and the plain task-aligned assigner. Criteria, models
and checkpoints stay Ultralytics' own objects, so copies, averaged models, resumed runs and machines without this package see
nothing of it.
"""

import contextlib
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._precision import working_dtype
from .._version import __version__
from ..assigners import TaskAlignedAssigner
from ..losses import YOLO11Loss
from ._patching import Patch, Replacement, import_trainer, kept, require, unexpected
from ._stock import BCE, Stock, is_elementwise, say_what_stays
from ._ultralytics_graphs import Steps

if TYPE_CHECKING:
    DetectionTrainer: Any

__all__ = ["DetectionTrainer", "patch", "patched", "unpatch"]
TESTED = ("8.4.190", "8.4.190")
_EPS = 1e-9  # of the assigner; the criterion has it built in
_KEEPS_STOCK = "_triton_yolo_keeps_stock"  # attribute of a criterion: why
_MEMBERS = {
    "bce": (BCE,),
    "assigner": ("ultralytics.utils.tal.TaskAlignedAssigner",),
    "bbox_loss": ("ultralytics.utils.loss.BboxLoss",),
    "bbox_loss.dfl_loss": ("ultralytics.utils.loss.DFLoss", "builtins.NoneType"),  # one bin does without
}


def patch(*, cuda_graph: bool = False) -> None:
    """Compute the losses of Ultralytics' detectors with this package from now on, in this process and in those of its DDP.

    Covered are the detection criterion of YOLOv8, v9, v10, 11, 12 and 26, both branches of the one-to-one models included, and
    the plain assigner inside the segmentation and pose criteria. What has an assigner of its own (oriented boxes, YOLO26's
    segmentation and pose) keeps it, which is logged once; so do YOLOE's visual prompts, and whatever somebody has replaced a
    part of: a member of the criterion, a class, a method or a function that they use. The criterion returns a loss of shape
    (1,), the sum of the (3,) terms of the stock one, and the same named items.

    Args:
        cuda_graph: replay the training steps of detectors as CUDA graphs, forward pass, loss and backward (see
            ``triton_yolo.graphs``). Other steps run as they are: of validation, of ``multi_scale``, ``compile`` and DDP, with a
            criterion that keeps its stock computation, the last, smaller batch of an epoch, and the first of all.

    Raises:
        ImportError: Ultralytics is not installed.
        RuntimeError: Ultralytics' internals are not those that were tested, or, in an untested version, its loss is another.

    Warns:
        UserWarning: the version of Ultralytics is outside the tested range.
    """
    _PATCH.patch()
    if cuda_graph:
        _GRAPHS.patch()


def unpatch() -> None:
    """Undo ``patch``. Nothing happens if nothing was replaced.

    Raises:
        RuntimeError: somebody else has replaced the same methods in the meantime.
    """
    _GRAPHS.unpatch()
    _PATCH.unpatch()


@contextlib.contextmanager
def patched(*, cuda_graph: bool = False) -> Iterator[None]:
    """``patch`` for the length of a ``with`` block, unless it is done already."""
    with _PATCH.patched(), _GRAPHS.patched() if cuda_graph else contextlib.nullcontext():
        yield


def __getattr__(name: str) -> Any:
    if name != "DetectionTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = trainer = _make_trainer()
    return trainer


def _make_trainer() -> type:
    base = import_trainer("ultralytics", "ultralytics.models.yolo.detect")[0].DetectionTrainer

    def train(self: Any) -> Any:
        with patched():
            return base.train(self)

    doc = "Ultralytics' ``DetectionTrainer``, patched while it trains: ``YOLO(...).train(trainer=DetectionTrainer)``."
    return type("DetectionTrainer", (base,), {"__module__": __name__, "__doc__": doc, "train": train})


def _find() -> list[Replacement]:
    version, losses, assigners, launcher = _modules()
    _require_parameters(losses, "v8DetectionLoss", "loss", ("self", "preds", "batch"))
    _require_parameters(assigners, "TaskAlignedAssigner", "forward", ("self", *_ASSIGNER_INPUTS))
    for module, name in ((launcher, "generate_ddp_file"), (losses, "TVPDetectLoss")):
        _require(hasattr(module, name), f"{module.__name__}.{name} is gone")
    criterion, assigner = losses.v8DetectionLoss, assigners.TaskAlignedAssigner
    replacements: list[Replacement] = [
        (criterion, "loss", _criterion_loss(criterion)),
        (assigner, "forward", _assigner_forward(assigner)),
        (launcher, "generate_ddp_file", _ddp_file(launcher.generate_ddp_file)),
        (losses.TVPDetectLoss, "__init__", _prompt_criterion_init(losses.TVPDetectLoss)),
    ]
    if not _as_numbers(TESTED[0]) <= _as_numbers(version) <= _as_numbers(TESTED[1]):
        warnings.warn(f"ultralytics {version} is untested, tested is {_tested()}; comparing the losses", stacklevel=4)
        _compare_losses(replacements[0][2])
    say = logging.getLogger("ultralytics").info
    say(f"triton_yolo {__version__}: computes the losses of Ultralytics' detectors from now on")
    return replacements


def _find_graphs() -> list[Replacement]:
    models, trainers = import_trainer("ultralytics", "ultralytics.nn.tasks", "ultralytics.engine.trainer")
    _require_parameters(models, "BaseModel", "loss", ("self", "batch", "preds"))
    _require_parameters(trainers, "BaseTrainer", "train", ("self",))
    model, trainer, steps = models.BaseModel, trainers.BaseTrainer, Steps(_constants)
    return [(model, "loss", steps.model_loss(model.loss)), (trainer, "train", steps.trainer_train(trainer.train))]


def _require_parameters(module: Any, owner: str, name: str, parameters: tuple[str, ...]) -> None:
    method = vars(getattr(module, owner, object)).get(name)
    found = tuple(inspect.signature(method).parameters)[: len(parameters)] if callable(method) else None
    _require(found == parameters, f"{owner}.{name} takes {found}, expected {parameters}")


_ASSIGNER_INPUTS = ("pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes", "mask_gt")
_PATCH, _GRAPHS = Patch(_find), Patch(_find_graphs)


def _modules() -> tuple[str, Any, Any, Any]:
    names = ("ultralytics", "ultralytics.utils.loss", "ultralytics.utils.tal", "ultralytics.utils.dist")
    package, losses, assigners, launcher = import_trainer("ultralytics", *names)
    return package.__version__, losses, assigners, launcher


def _criterion_loss(owner: Any) -> Any:
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
            raise unexpected(*_subject(), f"the criterion's settings or inputs have changed: {error}") from error
        rows = torch.cat([column.to(dist.device, working_dtype(dist.dtype)) for column in columns], 1)
        out = criterion(dist.transpose(1, 2), scores.transpose(1, 2), shapes, rows)
        return out.loss.reshape(1), dict(zip(names, (out.box, out.cls, out.dfl), strict=True))

    return loss


_COMPUTATION: list[Stock] = []


def _difference(criterion: Any) -> str | None:
    """Why a detection criterion keeps its own computation, if it does."""
    return vars(criterion).get(_KEEPS_STOCK) or _COMPUTATION[0].difference(criterion)


def _constants(criterion: Any, device: torch.device) -> Hashable | None:
    """What a loss of ours reads of Ultralytics' criterion, with one branch or two; None if any of it is not ours."""
    losses = _modules()[1]
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


def _assigner_forward(owner: Any) -> Any:
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
            raise unexpected(*_subject(), f"the assigner's settings have changed: {error}") from error
        return tuple(kept(TaskAlignedAssigner, None, *settings)(*args, **kwargs))

    return forward


def _prompt_criterion_init(owner: Any) -> Any:
    """Mark the criterion inside YOLOE's for visual prompts, which takes single terms out of the loss with their gradient."""
    stock = owner.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        _require(hasattr(self, "vp_criterion"), f"{owner.__name__} has no vp_criterion")
        setattr(self.vp_criterion, _KEEPS_STOCK, f"it is part of a {type(self).__name__}")

    return init


def _topk2(assigner: Any) -> int | None:
    """The second top-k; Ultralytics repeats the first one where there is none."""
    return assigner.topk2 if assigner.topk2 < assigner.topk else None


def _ddp_file(stock: Any) -> Any:
    """Write the script that every rank runs so that it patches first: its process starts without the patch."""

    @functools.wraps(stock)
    def generate_ddp_file(trainer: Any) -> str:
        path = stock(trainer)
        with open(path, encoding="utf-8") as file:
            script = file.read()
        head = f"import sys\nsys.path[:] = {sys.path!r}\nimport {__name__}\n{__name__}.patch()\n"
        with open(path, "w", encoding="utf-8") as file:
            file.write(head + script)
        return path

    return generate_ddp_file


@torch.inference_mode(False)
@torch.enable_grad()
def _compare_losses(ours: Any) -> None:
    """Compare with the stock loss, and its gradient, on random numbers: an untested version may define another loss."""
    losses = _modules()[1]
    generator = torch.Generator().manual_seed(0)
    for reg_max in (16, 1):
        stock = _stock_criterion(losses, reg_max)
        shapes = [(16, 16), (8, 8), (4, 4)]
        preds = {
            "boxes": torch.rand(2, 4 * reg_max, 336, generator=generator) * 3,
            "scores": torch.randn(2, 3, 336, generator=generator),
        }
        leaves = [x.requires_grad_() for x in preds.values()]
        inputs = {**preds, "feats": [torch.zeros(2, 1, *shape) for shape in shapes]}
        low = torch.rand(6, 2, generator=generator) * 0.4
        size = torch.rand(6, 2, generator=generator) * 0.4 + 0.1
        boxes = torch.cat([low + size / 2, size], 1)
        batch = {"batch_idx": torch.arange(6.0) // 3, "cls": torch.arange(6.0)[:, None] % 3, "bboxes": boxes}
        results = []
        for method in (losses.v8DetectionLoss.loss, ours):
            with torch.autocast("cpu", enabled=False):
                total, items = method(stock, inputs, batch)
            _require(isinstance(items, Mapping), f"its loss items are a {type(items).__name__}, expected a mapping")
            results.append([*torch.autograd.grad(total.sum(), leaves), total.sum().detach(), *items.values()])
        for expected, actual in zip(*results, strict=True):
            _require(torch.allclose(actual, expected, 1e-3, 1e-3 * float(expected.abs().max())), "its loss is another")


def _stock_criterion(losses: Any, reg_max: int) -> Any:
    head = SimpleNamespace(stride=torch.tensor([8.0, 16.0, 32.0]), nc=3, no=3 + 4 * reg_max, reg_max=reg_max)
    gains = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    model = torch.nn.Linear(1, 1)
    model.args, model.model = gains, [head]  # type: ignore[assignment]
    return losses.v8DetectionLoss(model)


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _require(condition: bool, what: str) -> None:
    require(*_subject(), condition, what)


def _subject() -> tuple[str, str]:
    """What the adapter is for, as errors name it."""
    return f"ultralytics {sys.modules['ultralytics'].__version__}", _tested()


def _tested() -> str:
    return TESTED[0] if TESTED[0] == TESTED[1] else "{} to {}".format(*TESTED)
