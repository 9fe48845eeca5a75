"""Forward and backward of a step, each recorded as a CUDA graph."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Work = Callable[[], list[Tensor]]


class Recorder:
    """Makes CUDA graphs that share their memory: only one of them may be between its start and the use of its results."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), _stream_of(device)

    def record(self, work: Work) -> tuple[list[Tensor], Any]:
        """The results of ``work``, whose values come with the replay of the graph, and the graph.

        Raises:
            Exception: that of ``work``, or that of ending the graph.
        """
        graph, failure = torch.cuda.CUDAGraph(), None
        # Other threads may do as they like, as one that pins memory does.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
                try:
                    with _no_synchronisation():
                        return work(), graph
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            if error is not failure:
                self._end_broken()
            raise failure or error from None

    def _end_broken(self) -> None:
        """Do the rest of what ending a capture does, which raised: numbers are drawn, and memory is taken, for it no more.

        Later versions of PyTorch do it themselves, and here raise at the first call about memory.
        """
        index = self._device.index
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream that a device captures on. Graphs share memory on one alone, and cuBLAS keeps a workspace for each.

    PyTorch has one, too, of the device that captured first.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the device, which says where, and leaves the capture whole that would break of it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Recording:
    """Forward and backward of a step with inputs of one shape, each a graph.

    Args:
        forward: takes tensors like the ``inputs``.
        inputs: are copied; the copies are what the graphs read.
        modules: whose parameters get gradients.
        gradients: a buffer a parameter, written by the backward graphs of all recordings; missing ones are made.
        recorder: makes graphs.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: list[Tensor],
        modules: Sequence[nn.Module],
        gradients: dict[nn.Parameter, Tensor],
        recorder: Recorder,
    ) -> None:
        kind = inputs[0].device.type
        self._inputs = [x.clone() for x in inputs]
        self.parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
        for p in self.parameters:
            if p not in gradients:
                gradients[p] = torch.empty_like(p.detach())
        leaves: list[nn.Parameter] = []
        outputs: list[Any] = []

        def run_forward() -> list[Tensor]:
            with _fresh_leaves(modules) as fresh:
                outputs[:], self._structure = tree_flatten(forward(*self._inputs))
            leaves[:] = [fresh[p] for p in self.parameters]
            _require_known_leaves(outputs, leaves)
            return [x.detach() for x in outputs if isinstance(x, Tensor)]

        def run_backward() -> list[Tensor]:
            given = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
            with torch.autocast(kind, enabled=False):
                found = torch.autograd.grad(given, leaves, self._output_gradients, allow_unused=True)
            used = [(p, gradient) for p, gradient in zip(self.parameters, found, strict=True) if gradient is not None]
            torch._foreach_copy_([gradients[p] for p, _ in used], [gradient for _, gradient in used])
            self._used = {p: gradients[p] for p, _ in used}
            return []

        self._outputs, self._forward = recorder.record(run_forward)
        self._template = [None if isinstance(x, Tensor) else x for x in outputs]
        self._is_tensor = [isinstance(x, Tensor) for x in outputs]
        self.has_gradient = [x.requires_grad for x in outputs if isinstance(x, Tensor)]
        self._output_gradients = [torch.empty_like(x) for x in compress(self._outputs, self.has_gradient)]
        self._backward = recorder.record(run_backward)[1]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._forward.replay()
        return [x.clone() for x in self._outputs]

    def backward(self, output_gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        for own, given in zip(self._output_gradients, compress(output_gradients, self.has_gradient), strict=True):
            own.zero_() if given is None else own.copy_(given)
        self._backward.replay()
        # Copies: a parameter without a gradient keeps what it is given, and the next replay would write into that.
        copies = dict(zip(self._used, torch._foreach_mul(list(self._used.values()), 1.0), strict=True))
        return [copies.get(p) for p in self.parameters]

    def unflatten(self, tensors: tuple[Tensor, ...]) -> Any:
        """The nest that the recorded forward returned, with these tensors."""
        remaining = iter(tensors)
        values = [next(remaining) if is_tensor else x for x, is_tensor in zip(self._template, self._is_tensor, strict=True)]
        return tree_unflatten(values, self._structure)

    def reset(self) -> None:
        self._forward.reset()
        self._backward.reset()
        self._inputs = self._outputs = self._output_gradients = []
        self._used = {}


@contextlib.contextmanager
def _fresh_leaves(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Put another parameter over the memory of each while recording.

    A parameter's gradient is summed by a node that belongs to the stream of the step that made it, and lives as long as any
    loss of that step; one of the default stream breaks the recording. And autocast may keep a cast of the parameter.
    """
    owners = [module._parameters for root in modules for module in root.modules()]
    places = [(owner, name, p) for owner in owners for name, p in owner.items() if p is not None]
    fresh = {p: nn.Parameter(p.detach(), p.requires_grad) for _, _, p in places}
    try:
        for owner, name, p in places:
            owner[name] = fresh[p]
        yield fresh
    finally:
        for owner, name, p in places:
            owner[name] = p


def _require_known_leaves(outputs: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    """Raise if anything has a gradient that the graphs would lose."""
    known, seen = set(map(id, leaves)), set()
    todo = [x.grad_fn for x in outputs if isinstance(x, Tensor)]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(f"forward uses a parameter {tuple(leaf.shape)} that is not in the modules")
        todo += [following for following, _ in node.next_functions]
