"""Gradients times the one that arrives from outside, which is 1 in most trainings."""

from torch import Tensor


def scale_(grads: list[Tensor], grad: Tensor) -> None:
    if grad.device.type == "cpu" and grad == 1:  # a look that costs nothing there, and spares memory that is untouched yet
        return
    for x in grads:
        x.mul_(grad)
