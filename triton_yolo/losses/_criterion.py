"""What criteria share."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from .._ranks import Ranks
from ..targets import Targets


class Criterion(nn.Module):
    """What criteria share: the processes that a batch is spread over, and buffers that are filled whatever moves them.

    A criterion inside another has the processes of that one.
    """

    _made_with: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are kept under other names: to set them later would change nothing."""

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._made_with:
            raise AttributeError(f"{name} is given to {type(self).__name__} when it is made, and changes nothing later")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Fill the buffers again, as after ``to_empty``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Criterion":
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self


def writable(buffer: Tensor) -> Tensor:
    """The buffer, or fresh memory for one that was made, moved or copied in inference mode and has to do for training too."""
    if torch.compiler.is_compiling() or not buffer.is_inference():  # graphs can't ask
        return buffer
    with torch.inference_mode(False):
        return torch.empty_like(buffer)


def rows_of(targets: Tensor | Targets, preds: Tensor, num_others: int = 0, box_size: int = 4) -> list[Tensor]:
    """Targets as operations take them, for predictions (B, A, C) of classes and ``num_others``. Oriented boxes have size 5."""
    if isinstance(targets, Targets):
        _checks.ground_truth(targets, Targets._fields, preds, box_size)
        return list(targets)
    if not isinstance(targets, Tensor):
        forms = f"an (N, {2 + box_size}) tensor or triton_yolo.Targets, which takes padded boxes and lists too"
        raise TypeError(f"targets must be {forms}, got {type(targets).__name__}")
    # At every step: four looks and no call where all is as it should be.
    is_usual = targets.dtype in (torch.float32, torch.float64) and targets.device == preds.device
    if not is_usual or targets.dim() != 2 or targets.shape[1] != 2 + box_size:
        _checks.tensor("targets", targets, ("N", 2 + box_size), like=preds)
        _checks.exact("targets", targets, preds.shape[0], preds.shape[2] - num_others)
    return [targets.detach() if targets.requires_grad else targets]


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


def counts_of(num_fg: Tensor, like: Tensor, batch_size: int, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """What the terms are divided by, which is a mean over the ranks, and what their sum is multiplied by, if not B."""
    if ranks.given is None:
        return num_fg, None
    divisor, num_images = normaliser_of(torch.stack([num_fg.to(like.dtype), like.new_full((), batch_size)]), ranks).unbind()
    return divisor, num_images
