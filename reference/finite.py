"""Predictions that are not finite: they show in the loss and in every gradient."""

import math

from torch import Tensor


def poison(is_finite: Tensor, *preds: Tensor) -> Tensor:
    """0, or, where ``is_finite`` () is false, NaN with a gradient of NaN for every element of ``preds``."""
    factor = preds[0].new_zeros(()).masked_fill(~is_finite, math.nan)
    return sum((factor * x.nan_to_num()).sum() for x in preds)
