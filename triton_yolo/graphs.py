"""A training step as CUDA graphs: forward pass, loss and backward, recorded once and replayed at no cost to the host.

Two graphs a shape of input: one of the forward pass with the loss, one of its backward, joined by an ``autograd.Function`` of
the model's parameters. So a step stays what it was for everything around it: ``loss.backward()`` with any factor on the loss
(``GradScaler``, accumulation), gradients that accumulate, hooks of parameters, optimiser, averaged models and checkpoints.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import _checks
from ._criterion import Criterion

__all__ = ["GraphedStep"]
_DEVICE = "cuda"  # ROCm's name, too

Work = Callable[[], list[Tensor]]


class GraphedStep:
    """Call ``forward(images, targets)`` as CUDA graphs where that is possible, and as it is where not.

    The first steps of a shape run as they are and warm everything up; then ``forward`` is recorded, which runs nothing, and
    replayed from that step on. What a step computes stays the same: dropout draws new numbers, batch norm counts a step once.

    As it is, a step runs on other devices than CUDA and ROCm, without gradients (validation), with a model in ``eval`` mode,
    with images that want a gradient, and with shapes that come too seldom (the last batch of an epoch). Targets are padded to
    128, 256, 512, ... rows, as many as the largest batch of this shape needed.

    A step is recorded again after a change of what is no input: parameters or buffers that became other tensors, ``training``
    or ``requires_grad`` of any, autocast, an attribute of one of this package's criteria, ``constants``. What changes in place
    needs no recording: weights, the buffers of the model, class weights, ``use_l1``.

    A step that cannot be recorded says why in one warning, and all steps run as they are from then on. Reasons are a
    synchronisation of host and device in ``forward``; a parameter that is in none of the ``modules``; a module on another
    device (move the criterion, too); targets that cannot be padded; ``DistributedDataParallel`` among the modules, or a
    criterion's ``process_group``. ``DistributedDataParallel`` may be around a module that calls the step.

    Between ``out = step(...)`` and ``out.loss.backward()`` no other step may run: the graphs of all shapes share their memory.
    Python in ``forward`` runs while recording only: hooks of modules, prints, counters. Double backward does not work.

    Args:
        forward: takes ``images`` and ``targets`` and returns a tensor or a nest of tensors, such as a criterion's output.
        modules: all modules that ``forward`` uses, model and criterion.
        warmup: steps of one shape that run as they are, one after another, before that shape is recorded.
        min_rows: the smallest number of rows that targets are padded to.
        max_graphs: so many shapes are recorded, others run as they are.
        constants: returns what else ``forward`` reads that is no tensor of the modules and may change between steps, as a gain,
            or the ``p`` of a dropout that has a schedule.

    Attributes:
        num_replays: steps that were replayed.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a module is none.

    Example:
        >>> def forward(images, targets):
        ...     with torch.autocast("cuda", torch.float16):
        ...         pred_dist, pred_scores, feat_shapes = model(images)
        ...     return criterion(pred_dist, pred_scores, feat_shapes, targets)
        >>> step = GraphedStep(forward, model, criterion)
        >>> for images, targets in batches:
        ...     out = step(images, targets)
        ...     optimizer.zero_grad()
        ...     scaler.scale(out.loss).backward()
        ...     scaler.step(optimizer)
        ...     scaler.update()
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Any], Any],
        *modules: nn.Module,
        warmup: int = 3,
        min_rows: int = 128,
        max_graphs: int = 16,
        constants: Callable[[], Hashable] = tuple,
    ) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules must be modules, got {type(module).__name__}")
        _checks.require(len(modules) > 0, "modules", "have the model and the criterion", "none")
        self._forward, self._modules, self._constants = forward, modules, constants
        self._warmup, self._min_rows = _checks.whole("warmup", warmup), _checks.whole("min_rows", min_rows)
        self._max_graphs = _checks.whole("max_graphs", max_graphs)
        self.num_replays = 0
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._recordings: dict[_Signature, _Recording] = {}
        self._num_rows: dict[torch.Size, int] = {}
        self._state: Hashable = None
        self._last: tuple[_Signature | None, int] = None, 0  # and how often it came without another in between
        self._in_flight: object = None
        self._is_off = False

    def __call__(self, images: Tensor, targets: Any) -> Any:
        """Run a step.

        Args:
            images: (B, ...) on the device of the modules.
            targets: a tensor (N, ...) or a nest of such tensors, on the same device: YOLO rows (N, 6), ``Targets``, or
                a mapping of columns. Padding is rows of -1, as image index and everywhere else.

        Returns:
            What ``forward`` returns. Its tensors are the caller's own; those with a gradient have one.

        Raises:
            RuntimeError: in ``backward``, if another step has run since, or this backward has.
        """
        columns, spec = tree_flatten(targets)
        recording = None
        if not self._is_off and self._may_record(images, columns):
            try:
                self._notice_changes(images)
                columns = self._padded(columns, images)
                recording = self._recording(images, columns, spec)
                targets = tree_unflatten(columns, spec)
            except Exception as error:
                self._give_up(error)
        if recording is None:  # and the error is gone, whose traceback may hold the memory of a step
            return self._forward(images, targets)
        self.num_replays += 1
        return recording.unflatten(_Replay.apply(self, recording, [images, *columns], *recording.parameters))

    def release(self) -> None:
        """Free the memory of all graphs. Later steps are recorded again."""
        self._drop(list(self._recordings))
        self._gradients.clear()
        self._state, self._last = None, (None, 0)

    def _may_record(self, images: Tensor, columns: Sequence[Any]) -> bool:
        return (
            images.device.type == _DEVICE
            and torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
            and not any(x.requires_grad for x in (images, *columns) if isinstance(x, Tensor))
            and all(module.training for module in self._modules)
            and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        )

    def _notice_changes(self, images: Tensor) -> None:
        """Forget what was recorded if anything but the inputs and the numbers in tensors has changed."""
        modules = list(self._modules)
        for module in modules:  # which grows; ``modules()`` takes several times as long
            modules += [child for child in module._modules.values() if child is not None]
        state = (
            [module.training for module in modules],
            [(p.data_ptr(), p.requires_grad) for module in modules for p in module._parameters.values() if p is not None],
            [b.data_ptr() for module in modules for b in module._buffers.values() if b is not None],
            [_settings(module) for module in modules if isinstance(module, Criterion)],
            self._constants(),
        )
        if state != self._state:
            _require_recordable(modules, images.device)
            self.release()
            self._state = state

    def _padded(self, columns: list[Any], images: Tensor) -> list[Tensor]:
        """Columns with as many rows as the largest batch of this shape needed; graphs of fewer are dropped."""
        _require_columns(columns, images.device)
        num_rows, shape = len(columns[0]), images.shape
        before = self._num_rows.get(shape, 0)
        if num_rows > before:
            self._drop([signature for signature in self._recordings if signature.shape == shape])
            self._num_rows[shape] = max(self._min_rows, 1 << (num_rows - 1).bit_length())
        return [_pad(column, self._num_rows.setdefault(shape, self._min_rows)) for column in columns]

    def _recording(self, images: Tensor, columns: list[Tensor], spec: TreeSpec) -> "_Recording | None":
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        types = tuple((column.shape, column.dtype) for column in columns)
        signature = _Signature(images.shape, images.dtype, types, repr(spec), autocast)
        count = self._last[1] + 1 if signature == self._last[0] else 1
        self._last = signature, count
        if signature not in self._recordings and count > self._warmup and len(self._recordings) < self._max_graphs:
            if not self._recordings:
                self._recorder = _Recorder(images.device)  # a pool that lost all of its graphs takes no new ones
            self._recordings[signature] = _Recording(
                lambda images, *columns: self._forward(images, tree_unflatten(columns, spec)),
                [images, *columns],
                self._modules,
                self._gradients,
                self._recorder,
            )
        return self._recordings.get(signature)

    def _drop(self, signatures: "list[_Signature]") -> None:
        for signature in signatures:
            self._recordings.pop(signature).reset()
            self._in_flight = None

    def _give_up(self, error: Exception) -> None:
        self._is_off = True
        self.release()
        reason = f"{type(error).__name__}: {error}".strip()
        _checks.warn(f"no CUDA graph of the training step, which runs without from now on: {reason}")


class _Signature(NamedTuple):
    """What must be equal for a replay, of the inputs."""

    shape: torch.Size
    dtype: torch.dtype
    columns: tuple[tuple[torch.Size, torch.dtype], ...]
    structure: str
    autocast: tuple[bool, torch.dtype]


def _settings(criterion: Criterion) -> tuple[Any, ...]:
    """What the forward of a criterion reads that is no tensor."""
    plain = (bool, int, float, str, tuple)
    public = [(name, x) for name, x in vars(criterion).items() if isinstance(x, plain) and not name.startswith("_")]
    return criterion.process_group, *public


def _require_recordable(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        name = type(module).__name__
        if isinstance(module, DistributedDataParallel):
            raise ValueError(f"{name} averages gradients in hooks, which no graph has: wrap a module that calls the step")
        if isinstance(module, Criterion) and module.process_group is not None:
            raise ValueError(f"{name} has a process_group, and ranks are not known to replay together")
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) is not nn.Parameter:
                raise ValueError(f"{name} has a {type(parameter).__name__}, expected plain parameters")
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, the images are on {device}")


def _require_columns(columns: Sequence[Any], device: torch.device) -> None:
    for column in columns:
        if not isinstance(column, Tensor):
            raise TypeError(f"targets must be tensors, got {type(column).__name__}")
        if column.device != device:
            raise ValueError(f"targets are on {column.device}, the images are on {device}")
        if not column.dtype.is_signed:
            raise ValueError(f"targets must be of signed types, so that -1 can be padding, got {column.dtype}")
    lengths = sorted({len(column) if column.ndim else 0 for column in columns})
    _checks.require(len(lengths) == 1, "targets", "have one row a box in all of their tensors", f"{lengths} rows")


def _pad(column: Tensor, num_rows: int) -> Tensor:
    return torch.cat([column, column.new_full((num_rows - len(column), *column.shape[1:]), -1)])


class _Recording:
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
        recorder: "_Recorder",
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


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: GraphedStep, recording: _Recording, inputs: list[Tensor], *_: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.step, ctx.recording = step, recording
        ctx.token = step._in_flight = object()
        outputs = recording.forward(inputs)
        ctx.mark_non_differentiable(*[x for x, has in zip(outputs, recording.has_gradient, strict=True) if not has])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.step._in_flight is not ctx.token:
            raise RuntimeError(
                "backward of a replayed step must run once, before the next step: the graphs' memory holds the newest alone"
            )
        ctx.step._in_flight = None
        return None, None, None, *ctx.recording.backward(gradients)


class _Recorder:
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
