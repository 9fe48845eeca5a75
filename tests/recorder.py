"""CUDA graphs without CUDA: work that is replayed by running it again, into the results of the first time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from triton_yolo import graphs


class Replay:
    def __init__(self, work: Callable[[], list[Tensor]], results: list[Tensor]) -> None:
        self._work, self._results = work, results

    def replay(self) -> None:
        with torch.enable_grad():
            for own, new in zip(self._results, self._work(), strict=True):
                own.copy_(new)

    def reset(self) -> None:
        """A graph that was reset must not run."""
        self._work = None


class Recorder:
    """Stands in for ``_recording.Recorder``. Recording changes no tensor, as on a GPU that runs nothing; results are junk."""

    modules: tuple[nn.Module, ...] = ()
    num_graphs = num_pools = 0

    def __init__(self, device: torch.device) -> None:
        Recorder.num_pools += 1

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Replay]:
        with torch.random.fork_rng(devices=[]), unchanged(Recorder.modules):
            results = [x.clone() for x in work()]
        for x in results:
            x.fill_(-1)
        Recorder.num_graphs += 1
        return results, Replay(work, results)


@contextmanager
def unchanged(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    before = [(x, x.clone()) for module in modules for x in module.buffers()]
    try:
        yield
    finally:
        for x, value in before:
            x.data.copy_(value)  # unnoticed by what autograd has saved


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[type[Recorder]]:
    """Let steps of these modules be recorded on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_DEVICE", "cpu")
        patch.setattr(graphs, "Recorder", Recorder)
        patch.setattr(Recorder, "modules", modules)
        patch.setattr(Recorder, "num_graphs", 0)
        patch.setattr(Recorder, "num_pools", 0)
        yield Recorder
