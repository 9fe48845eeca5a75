"""Ultralytics' training steps as CUDA graphs: while a trainer trains, its model's loss of a batch is a ``GraphedStep``."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .._version import __version__
from ..graphs import GraphedStep
from ._ultralytics_detect import Constants

Pick = Callable[[Any, Any], Constants | None]


class Steps:
    """The graphs of the training that is going on.

    Args:
        constants: takes a model's criterion and a device; what a step depends on there, or None if the criterion is none of
            ours.
    """

    def __init__(self, constants: Pick) -> None:
        self._constants = constants
        self._of: dict[nn.Module, GraphedStep | None] = {}
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
                for step in filter(None, self._of.values()):
                    step.release()
                self._of.clear()

        return train

    def model_loss(self, stock: Any) -> Any:
        """The loss of a batch, replayed if the batch is one of training and all of its loss is ours."""

        @functools.wraps(stock)
        def loss(model: nn.Module, batch: Mapping[str, Any], preds: Any = None) -> Any:
            if not self._is_training or preds is not None or not model.training or dist.is_initialized():
                return stock(model, batch, preds)
            if model not in self._of:  # the first step makes the criterion, and shows what keeps the stock computation
                self._of[model] = None
                return stock(model, batch)
            device = batch["img"].device
            constants = self._constants(getattr(model, "criterion", None), device)
            if constants is None:
                return stock(model, batch)
            step = self._of[model] = self._of[model] or self._make(model, stock)
            images, targets = (
                {name: batch[name].to(device) for name in names} for names in (("img", *constants.by_image), constants.by_row)
            )
            return step(images, targets)

        return loss

    def _make(self, model: nn.Module, stock: Any) -> GraphedStep:
        def forward(images: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Any:
            return stock(model, {**images, **targets})

        device = next(model.parameters()).device
        return GraphedStep(forward, model, constants=lambda: self._constants(model.criterion, device))
