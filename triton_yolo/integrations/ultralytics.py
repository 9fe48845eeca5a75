"""Ultralytics' trainers with this package's loss and assignment: ``patch()`` before ``YOLO(...).train(...)``.

What changes is how the losses of some criteria are computed, those of detection, oriented boxes, segmentation and pose, and
the plain task-aligned assigner. Criteria, models and checkpoints stay Ultralytics' own objects, so copies, averaged models,
resumed runs and machines without this package see nothing of it.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import _checks
from .._version import __version__
from ._patching import Patch, Replacement, import_trainer
from ._ultralytics_detect import (
    ASSIGNER_INPUTS,
    COMPUTATIONS,
    DETECTION,
    KEEPS_STOCK,
    assigner_forward,
    constants,
    criterion_loss,
)
from ._ultralytics_graphs import Steps
from ._ultralytics_obb import ORIENTED
from ._ultralytics_pose import POSE
from ._ultralytics_segment import SEGMENTATION
from ._ultralytics_version import TESTED, as_numbers, compare_losses, modules, require_here, require_parameters, tested

if TYPE_CHECKING:
    DetectionTrainer: Any

_CRITERIA = {
    "v8DetectionLoss": DETECTION, "v8OBBLoss": ORIENTED, "v8SegmentationLoss": SEGMENTATION, "v8PoseLoss": POSE,
}  # fmt: skip
__all__ = ["DetectionTrainer", "patch", "patched", "unpatch"]


def patch(*, cuda_graph: bool = False) -> None:
    """Compute the losses of Ultralytics' detectors with this package from now on, in this process and in those of its DDP.

    Covered are the criteria of detection of YOLOv8, v9, v10, 11, 12 and 26 and of oriented boxes of v8, 11 and 26, both
    branches of the one-to-one models included, of segmentation and pose of v8 and 11, and the plain assigner wherever else it
    is used. What has an assigner of its own (YOLO26's segmentation and pose) keeps it, which is logged once; so do YOLOE's
    visual prompts, and whatever somebody has replaced a part of: a member of the criterion, a class, a method or a function
    that they use. A criterion returns a loss of shape (1,), the sum of the terms of the stock one, and the same named items.

    Args:
        cuda_graph: replay the training steps as CUDA graphs, forward pass, loss and backward, whatever the task (see
            ``triton_yolo.graphs``). Other steps run as they are: of validation, of ``multi_scale``, ``compile`` and DDP, with a
            criterion that keeps its stock computation, the last, smaller batch of an epoch, and the first of all.

    Raises:
        ImportError: Ultralytics is not installed.
        RuntimeError: Ultralytics' internals are not those that were tested, or, in an untested version, all its losses differ.

    Warns:
        UserWarning: the version of Ultralytics is outside the tested range; a loss differs there, and stays as it is.
    """
    wants_graphs, was_applied = _checks.boolean("cuda_graph", cuda_graph), _PATCH.is_applied
    _PATCH.patch()
    try:
        if wants_graphs:
            _GRAPHS.patch()
    except BaseException:
        if not was_applied:
            _PATCH.unpatch()
        raise


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
    wants_graphs = _checks.boolean("cuda_graph", cuda_graph)
    with _PATCH.patched(), _GRAPHS.patched() if wants_graphs else contextlib.nullcontext():
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
    version, losses, assigners, launcher = modules()
    for name in _CRITERIA:
        require_parameters(losses, name, "loss", ("self", "preds", "batch"))
    require_parameters(assigners, "TaskAlignedAssigner", "forward", ("self", *ASSIGNER_INPUTS))
    for module, name in ((launcher, "generate_ddp_file"), (losses, "TVPDetectLoss")):
        require_here(hasattr(module, name), f"{module.__name__}.{name} is gone")
    assigner, criteria = assigners.TaskAlignedAssigner, {getattr(losses, name): adapter for name, adapter in _CRITERIA.items()}
    replacements: list[Replacement] = [
        *[(criterion, "loss", criterion_loss(criterion, adapter)) for criterion, adapter in criteria.items()],
        (assigner, "forward", assigner_forward(assigner)),
        (launcher, "generate_ddp_file", _ddp_file(launcher.generate_ddp_file)),
        (losses.TVPDetectLoss, "__init__", _prompt_criterion_init(losses.TVPDetectLoss)),
    ]
    if not as_numbers(TESTED[0]) <= as_numbers(version) <= as_numbers(TESTED[1]):
        warnings.warn(f"ultralytics {version} is untested, tested is {tested()}; comparing the losses", stacklevel=4)
        replacements = [*_same_losses(replacements[: len(criteria)]), *replacements[len(criteria) :]]
    say = logging.getLogger("ultralytics").info
    say(f"triton_yolo {__version__}: computes the losses of Ultralytics' detectors from now on")
    return replacements


def _same_losses(replacements: list[Replacement]) -> list[Replacement]:
    """Those whose loss is that of ours; the others stay as they are, which a warning says, unless that is all of them."""
    same = []
    for owner, name, loss in replacements:
        try:
            compare_losses(owner, loss)
            same.append((owner, name, loss))
        except Exception as error:  # whatever an unknown version does
            del COMPUTATIONS[owner]
            difference = error
            warnings.warn(f"{owner.__name__} keeps its stock computation: {error}", stacklevel=5)
    if not same:
        raise difference
    return same


def _find_graphs() -> list[Replacement]:
    models, trainers = import_trainer("ultralytics", "ultralytics.nn.tasks", "ultralytics.engine.trainer")
    require_parameters(models, "BaseModel", "loss", ("self", "batch", "preds"))
    require_parameters(trainers, "BaseTrainer", "train", ("self",))
    model, trainer, steps = models.BaseModel, trainers.BaseTrainer, Steps(constants)
    return [(model, "loss", steps.model_loss(model.loss)), (trainer, "train", steps.trainer_train(trainer.train))]


_PATCH, _GRAPHS = Patch(_find), Patch(_find_graphs)


def _prompt_criterion_init(owner: Any) -> Any:
    """Mark the criterion inside YOLOE's for visual prompts, which takes single terms out of the loss with their gradient."""
    stock = owner.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        require_here(hasattr(self, "vp_criterion"), f"{owner.__name__} has no vp_criterion")
        setattr(self.vp_criterion, KEEPS_STOCK, f"it is part of a {type(self).__name__}")

    return init


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
