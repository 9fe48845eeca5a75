"""Everything is computed in float32, or in float64 for float64."""

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def working(x: Tensor) -> Tensor:
    return x.to(working_dtype(x.dtype))


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, all in float64 if one of them is: inputs of several types are computed in the widest."""
    for x in tensors:
        if x.dtype == torch.float64:
            return tuple(x.double() for x in tensors)
    return tensors
