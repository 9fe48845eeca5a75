"""A training step as CUDA graphs: forward pass, loss and backward, recorded once and replayed at no cost to the host.

Two graphs a shape of input: one of the forward pass with the loss, one of its backward, joined by an ``autograd.Function`` of
the model's parameters. So a step stays what it was for everything around it: ``loss.backward()`` with any factor on the loss
(``GradScaler``, accumulation), gradients that accumulate, hooks of parameters, optimiser, averaged models and checkpoints.
"""

import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import _checks
from ._recording import Recorder, Recording
from .losses._criterion import Criterion

__all__ = ["GraphedStep"]
_DEVICE = "cuda"  # ROCm's name, too


class GraphedStep:
    """Call ``forward(images, targets)`` as CUDA graphs where that is possible, and as it is where not.

    The first steps of a shape run as they are and warm everything up; then ``forward`` is recorded, which runs nothing, and
    replayed from that step on. What a step computes stays the same: dropout draws new numbers, batch norm counts a step once.

    As it is, a step runs on other devices than CUDA and ROCm, without gradients (validation), with a model in ``eval`` mode,
    with images that want a gradient, and with shapes that come too seldom (the last batch of an epoch). Targets are padded to
    128, 256, 512, ... rows, as many as the largest batch of this shape needed. What has no row a box goes with the images.

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
        forward: takes ``images`` and ``targets`` as the step is given them, and returns a tensor or a nest of tensors, such as
            a criterion's output.
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
        forward: Callable[[Any, Any], Any],
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
        self._recordings: dict[_Signature, Recording] = {}
        self._num_rows: dict[_Types, int] = {}
        self._state: Hashable = None
        self._last: tuple[_Signature | None, int] = None, 0  # and how often it came without another in between
        self._in_flight: object = None
        self._is_off = False

    def __call__(self, images: Any, targets: Any) -> Any:
        """Run a step.

        Args:
            images: a tensor (B, ...) on the device of the modules, or a nest of such tensors, as images and their masks
                (B, H, W).
            targets: a tensor (N, ...) or a nest of such tensors, on the same device: YOLO rows (N, 6), ``Targets``, or
                a mapping of columns, as boxes and their keypoints. Padding is rows of -1, as image index and everywhere
                else; masks (N, H, W) of a type without a sign have 0.

        Returns:
            What ``forward`` returns. Its tensors are the caller's own; those with a gradient have one.

        Raises:
            RuntimeError: in ``backward``, if another step has run since, or this backward has.
        """
        inputs, image_spec = tree_flatten(images)
        columns, target_spec = tree_flatten(targets)
        recording = None
        if not self._is_off and self._may_record(inputs, columns):
            try:
                device = _require_tensors(inputs, columns)
                self._notice_changes(device)
                columns = self._padded(columns, _types(inputs))
                recording = self._recording(inputs, columns, (image_spec, target_spec), device.type)
                targets = tree_unflatten(columns, target_spec)
            except Exception as error:
                self._give_up(error)
        if recording is None:  # and the error is gone, whose traceback may hold the memory of a step
            return self._forward(images, targets)
        self.num_replays += 1
        return recording.unflatten(_Replay.apply(self, recording, [*inputs, *columns], *recording.parameters))

    def release(self) -> None:
        """Free the memory of all graphs. Later steps are recorded again."""
        self._drop(list(self._recordings))
        self._gradients.clear()
        self._state, self._last = None, (None, 0)

    def _may_record(self, inputs: Sequence[Any], columns: Sequence[Any]) -> bool:
        return (
            any(x.device.type == _DEVICE for x in inputs if isinstance(x, Tensor))
            and torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
            and not any(x.requires_grad for x in (*inputs, *columns) if isinstance(x, Tensor))
            and all(module.training for module in self._modules)
            and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        )

    def _notice_changes(self, device: torch.device) -> None:
        """Forget what was recorded if anything but the inputs and the numbers in tensors has changed."""
        modules = list(self._modules)
        for module in modules:  # which grows; ``modules()`` takes several times as long
            modules += [child for child in module._modules.values() if child is not None]
        state = (
            [module.training for module in modules],
            [
                (id(p), p.data_ptr(), p.requires_grad)
                for module in modules
                for p in module._parameters.values()
                if p is not None
            ],
            [b.data_ptr() for module in modules for b in module._buffers.values() if b is not None],
            [_settings(module) for module in modules if isinstance(module, Criterion)],
            self._constants(),
        )
        if state != self._state:
            _require_recordable(modules, device)
            self.release()
            self._state = state

    def _padded(self, columns: list[Tensor], images: "_Types") -> list[Tensor]:
        """Columns with as many rows as the largest batch of such images needed; graphs of fewer are dropped."""
        num_rows, before = len(columns[0]), self._num_rows.get(images, 0)
        if num_rows > before:
            self._drop([signature for signature in self._recordings if signature.images == images])
            self._num_rows[images] = max(self._min_rows, 1 << (num_rows - 1).bit_length())
        return [_pad(column, self._num_rows.setdefault(images, self._min_rows)) for column in columns]

    def _recording(
        self, inputs: list[Tensor], columns: list[Tensor], specs: tuple[TreeSpec, TreeSpec], kind: str
    ) -> Recording | None:
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        signature = _Signature(_types(inputs), _types(columns), repr(specs), autocast)
        count = self._last[1] + 1 if signature == self._last[0] else 1
        self._last = signature, count
        if signature not in self._recordings and count > self._warmup and len(self._recordings) < self._max_graphs:
            if not self._recordings:
                self._recorder = Recorder(inputs[0].device)  # a pool that lost all of its graphs takes no new ones

            def forward(*tensors: Tensor) -> Any:
                parts = tensors[: len(inputs)], tensors[len(inputs) :]
                return self._forward(*map(tree_unflatten, parts, specs))

            self._recordings[signature] = Recording(
                forward, [*inputs, *columns], self._modules, self._gradients, self._recorder
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


_Types = tuple[tuple[torch.Size, torch.dtype], ...]


class _Signature(NamedTuple):
    """What must be equal for a replay, of the inputs."""

    images: _Types
    columns: _Types
    structure: str
    autocast: tuple[bool, torch.dtype]


def _types(tensors: Sequence[Tensor]) -> _Types:
    return tuple((x.shape, x.dtype) for x in tensors)


def _settings(criterion: Criterion) -> tuple[Any, ...]:
    """What the forward of a criterion reads that is no tensor."""
    plain = (numbers.Real, str, tuple, list)
    public = [(name, x) for name, x in vars(criterion).items() if isinstance(x, plain) and not name.startswith("_")]
    return criterion.process_group, *[(name, tuple(x) if isinstance(x, list) else x) for name, x in public]


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


def _require_tensors(inputs: Sequence[Any], columns: Sequence[Any]) -> torch.device:
    """The device of all of them."""
    for name, given in (("images", inputs), ("targets", columns)):
        for x in given:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be tensors, got {type(x).__name__}")
            if x.device != inputs[0].device:
                others = "the images are" if name == "targets" else "the first of them is"
                raise ValueError(f"{name} are on {x.device}, {others} on {inputs[0].device}")
    for column in columns:
        if column.ndim < 3 and not column.dtype.is_signed:
            raise ValueError(f"targets must be of signed types, so that -1 can be padding, got {column.dtype}")
    lengths = sorted({len(column) if column.ndim else 0 for column in columns})
    _checks.require(len(lengths) == 1, "targets", "have one row a box in all of their tensors", f"{lengths} rows")
    return inputs[0].device


def _pad(column: Tensor, num_rows: int) -> Tensor:
    padding = -1 if column.dtype.is_signed else 0
    return torch.cat([column, column.new_full((num_rows - len(column), *column.shape[1:]), padding)])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: GraphedStep, recording: Recording, inputs: list[Tensor], *_: Tensor) -> tuple[Tensor, ...]:
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
