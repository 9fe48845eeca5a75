"""Predictions that are not finite."""

import torch
from torch import Tensor

_PART = 1 << 20  # elements


def is_finite(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite: ()."""
    ends = Extremes(x)
    # One part after another: the second look at it finds it in the processor's cache.
    for part in x.split(max(1, _PART * len(x) // x.numel())) if x.numel() else ():
        ends.add(part)
    return ends.are_finite()


class Extremes:
    """The largest and the smallest of several tensors like the first, and 0; a NaN is both."""

    def __init__(self, x: Tensor) -> None:
        self.highest = self.lowest = x.new_zeros(())

    def add(self, x: Tensor) -> Tensor:
        """The largest of ``x`` alone."""
        highest = x.amax()
        self.highest, self.lowest = torch.maximum(self.highest, highest), torch.minimum(self.lowest, x.amin())
        return highest

    def are_finite(self) -> Tensor:
        return (self.highest < torch.inf) & (self.lowest > -torch.inf)
