"""Predictions that are not finite."""

import torch
from torch import Tensor


def is_finite(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite: (). A NaN is the largest and the smallest of its tensor."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    return (x.amax() < torch.inf) & (x.amin() > -torch.inf)
