"""Ultralytics' training steps as CUDA graphs: while a trainer trains, its model's loss of a batch is a ``GraphedStep``."""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .._version import __version__
from ..graphs import GraphedStep

_COLUMNS = ("batch_idx", "cls", "bboxes")

Constants = Callable[[Any, Any], Hashable | None]


class Steps:
    """The graphs of the training that is going on.

    Args:
        constants: takes a model's criterion and a device; what the loss reads there that is no input and no tensor of the
            model, or None if the criterion is none of ours.
    """

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._of: dict[nn.Module, GraphedStep] = {}
        self._is_training = False

    def trainer_train(self, stock: Any) -> Any:
        """Replay while this method of a trainer runs; the memory of the graphs is free after it."""

        @functools.wraps(stock)
        def train(trainer: Any) -> Any:
            if trainer.args.multi_scale:
                logging.getLogger("ultralytics").info(f"triton_yolo {__version__}: multi_scale trains without CUDA graphs")
                return stock(trainer)
            self._is_training = True
            try:
                return stock(trainer)
            finally:
                self._is_training = False
                for step in self._of.values():
                    step.release()
                self._of.clear()

        return train

    def model_loss(self, stock: Any) -> Any:
        """The loss of a batch, replayed if the batch is one of training and all of its loss is ours."""

        @functools.wraps(stock)
        def loss(model: nn.Module, batch: Mapping[str, Any], preds: Any = None) -> Any:
            criterion = getattr(model, "criterion", None)
            is_ours = self._is_training and preds is None and model.training and criterion is not None
            if not is_ours or dist.is_initialized() or self._constants(criterion, batch["img"].device) is None:
                return stock(model, batch, preds)
            step, images = self._of.get(model), batch["img"]
            if step is None:
                step = self._of[model] = self._make(model, stock)
            return step(images, {name: batch[name].to(images.device) for name in _COLUMNS})

        return loss

    def _make(self, model: nn.Module, stock: Any) -> GraphedStep:
        def forward(images: Tensor, columns: Mapping[str, Tensor]) -> Any:
            return stock(model, {"img": images, **columns})

        device = next(model.parameters()).device
        return GraphedStep(forward, model, constants=lambda: self._constants(model.criterion, device))
