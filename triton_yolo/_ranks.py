"""The processes that a batch is spread over."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """A process group, True for that of all ranks, or None for one process. Copies share it, a pickle drops it."""

    def __init__(self, given: dist.ProcessGroup | bool | None) -> None:
        if not (given is None or isinstance(given, (bool, dist.ProcessGroup))):
            raise TypeError(f"process_group must be a ProcessGroup, True or None, got {type(given).__name__}")
        self.given: Any = given if given is not False else None
        self._is_lost = False

    def total(self, x: Tensor) -> tuple[Tensor, int]:
        """The sum over the ranks, and how many there are."""
        if self._is_lost:
            raise RuntimeError("a process group is not part of a pickle: set process_group of this criterion again")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("process_group is given, but torch.distributed.init_process_group has not been called")
        group = dist.group.WORLD if self.given is True else self.given
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x, dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __getstate__(self) -> dict[str, Any]:
        is_lost = self._is_lost or isinstance(self.given, dist.ProcessGroup)
        return {"given": "lost" if is_lost else self.given, "_is_lost": is_lost}
