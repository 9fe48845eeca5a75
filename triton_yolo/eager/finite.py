"""Predictions that are not finite."""

import torch
from torch import Tensor

_PART = 1 << 20  # elements


def is_finite(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite: ()."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    # One part after another: the second look at it finds it in the processor's cache.
    parts = x.split(max(1, _PART * len(x) // x.numel()))
    return are_finite([extreme for part in parts for extreme in extremes(part)])


def extremes(x: Tensor) -> list[Tensor]:
    """The largest and the smallest of ``x``; a NaN is both."""
    return [x.amax(), x.amin()]


def are_finite(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).isfinite().all()
