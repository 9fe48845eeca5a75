"""What criteria share."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from .._ranks import Ranks
from .._signatures import TaskAligned
from ..targets import Targets


class Criterion(nn.Module):
    """What criteria share: the processes that a batch is spread over, and buffers that are filled whatever moves them.

    A criterion inside another has the processes of that one.
    """

    def __init__(self, process_group: dist.ProcessGroup | bool | None) -> None:
        super().__init__()
        self._ranks = Ranks(process_group)

    @property
    def process_group(self) -> dist.ProcessGroup | bool | None:
        return self._ranks.given

    @process_group.setter
    def process_group(self, value: dist.ProcessGroup | bool | None) -> None:
        self._ranks = Ranks(value)
        for child in self.children():
            if isinstance(child, Criterion):
                child.process_group = value

    def reset_parameters(self) -> None:
        """Fill the buffers again, as after ``to_empty``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Criterion":
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self


class TaskAlignedCriterion(Criterion):
    """Settings of criteria with a task-aligned assigner; the arguments are those of ``YOLO11Loss``, gains by their names."""

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float],
        reg_max: int,
        topk: int,
        topk2: int | None,
        alpha: float,
        beta: float,
        min_box_side: float,
        class_weights: Tensor | None,
        process_group: dist.ProcessGroup | bool | None,
        **gains: float,
    ) -> None:
        super().__init__(process_group)
        self.num_classes = _checks.whole("num_classes", num_classes)
        self.strides, self.reg_max = _checks.reals("strides", strides), _checks.whole("reg_max", reg_max)
        self.assigner = TaskAligned(
            _checks.whole("topk", topk), None if topk2 is None else _checks.whole("topk2", topk2),
            _checks.real("alpha", alpha), _checks.real("beta", beta), _checks.real("min_box_side", min_box_side), 1e-9,
        )  # fmt: skip
        self.gains = tuple(_checks.real(name, gain) for name, gain in gains.items())
        if class_weights is not None:
            _checks.class_weights("class_weights", class_weights, self.num_classes)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self._last_weights = class_weights  # with values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Criterion:
        if self.class_weights is not None and not self.class_weights.is_meta:
            self._last_weights = self.class_weights
        return super()._apply(fn, recurse)

    def reset_parameters(self) -> None:
        if self._last_weights is not None and self.class_weights is not None and not self.class_weights.is_meta:
            with torch.no_grad():
                self.class_weights.copy_(self._last_weights)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, strides={self.strides}, reg_max={self.reg_max}, topk={self.assigner.topk}"


def rows_of(targets: Tensor | Targets, preds: Tensor, num_others: int = 0, box_size: int = 4) -> list[Tensor]:
    """Targets as operations take them, for predictions (B, A, C) of classes and ``num_others``. Oriented boxes have size 5."""
    if isinstance(targets, Targets):
        _checks.ground_truth(targets, Targets._fields, preds, box_size)
        return list(targets)
    if not isinstance(targets, Tensor):
        forms = f"an (N, {2 + box_size}) tensor or triton_yolo.Targets, which takes padded boxes and lists too"
        raise TypeError(f"targets must be {forms}, got {type(targets).__name__}")
    _checks.tensor("targets", targets, ("N", 2 + box_size), like=preds)
    if targets.dtype not in (torch.float32, torch.float64):
        _checks.exact("targets", targets, preds.shape[0], preds.shape[2] - num_others)
    return [targets.detach()]


def unless_nan(loss: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
    """Terms (), each NaN where the loss () is: what is not a number anywhere is one nowhere."""
    return torch.stack(terms).masked_fill(loss.detach().isnan(), torch.nan).unbind()


def normaliser_of(sums: Tensor, ranks: Ranks) -> Tensor:
    """What a loss is normalised by, from the ``sums`` () or (2,) of every rank: their sum, at least 1; NaN stays NaN.

    The first, which the terms are divided by, is the mean over the ranks, since gradients are averaged over them.
    """
    if ranks.given is None:
        return sums.clamp(min=1)
    sums, size = ranks.total(sums)
    sums = sums.clamp(min=1)
    sums.view(-1)[0] /= size
    return sums
