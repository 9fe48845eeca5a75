"""What a bound launch passes is what Triton's own path would: the kernel that its binder picks, and every argument.

A driver that launches nothing records what it is given, and instead of a compiler everything that Triton would compile for gets
a handle: kernel, types, constants, alignments and options.
"""

import contextlib
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from bench.host_step import NullDriver
from tests import operations
from tests.conftest import DEVICE
from tests.operations import INPUTS, tensors_of, with_tensors
from tests.tools.target import active
from triton_yolo import _signatures as of
from triton_yolo import kernels
from triton_yolo.kernels import launch
from triton_yolo.kernels.launch import Workspace

pytestmark = pytest.mark.skipif(launch.INTERPRETED or DEVICE.type != "cpu", reason="needs Triton's path, and no device")
STREAM = 7


class Launched(NamedTuple):
    """What a launcher was given; arguments are flat."""

    kernel: str
    function: int
    metadata: Any
    grid: tuple[int, ...]
    stream: int
    args: list[Any]


def flat(args: Any) -> Iterator[Any]:
    for x in args:
        if isinstance(x, tuple):
            yield from flat(x)
        else:
            yield x


class Recorder(NullDriver):
    """Records the launches of every thread."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()
        self._handles: dict[Any, int] = {}
        self._names: dict[int, str] = {}

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        content = source.fn.__name__, source.hash(), str(options), str(target)
        handle = self._handles.setdefault(content, len(self._handles) + 1)
        self._names[handle] = source.fn.__name__
        return SimpleNamespace(
            run=self._launch, function=handle, packed_metadata=(handle,), launch_metadata=lambda *_: None, hash=content
        )

    def _launch(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        _, _, _, *args = rest  # two hooks and what they get
        if (launches := getattr(self._of_thread, "launches", None)) is not None:
            launches.append(Launched(self._names[function], function, metadata, (x, y, z), stream, list(flat(args))))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Launched]]:
        self._of_thread.launches = []
        yield self._of_thread.launches
        self._of_thread.launches = None


@pytest.fixture
def driver(monkeypatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(launch, "_plans", {})
    with active(recorder), mock.patch("triton.compiler.compile", recorder.compile):
        yield recorder


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """With a hook, as a profiler sets it, so that Triton launches."""

    def hook(metadata: Any) -> None: ...

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


class Ran(NamedTuple):
    out: Any
    launches: list[Launched]
    memory: list[Tensor]

    @property
    def is_bound(self) -> bool:
        return not any(isinstance(arg, Tensor) for launched in self.launches for arg in launched.args)


def run(driver: Recorder, function: Callable[[Any], Any], x: Any) -> Ran:
    """Run an operation and say what it launched, and in which workspaces."""
    memory, addresses = [], Workspace.addresses

    def kept(workspace: Workspace, *args: Any) -> Any:
        found = addresses(workspace, *args)
        memory.extend(filter(lambda part: part is not None, found[:1]))
        return found

    with mock.patch.object(Workspace, "addresses", kept), driver.recording() as launches:
        out = function(x)
    return Ran(out, launches, memory)


def place(x: Tensor, known: list[Tensor]) -> tuple[int, int] | None:
    """Which of the known tensors ``x`` lies in, and how far from its beginning."""
    for number, tensor in enumerate(known):
        if x.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() != 0:
            return number, x.data_ptr() - tensor.data_ptr()
    return None


def assert_equal_launches(bound: Ran, own: Ran, x: Any) -> None:
    """Those of the bound path, and of Triton's own."""
    same = [(a[:5], len(a.args)) == (b[:5], len(b.args)) for a, b in zip(bound.launches, own.launches, strict=True)]
    assert all(same), [(a[:5], b[:5]) for a, b, ok in zip(bound.launches, own.launches, same, strict=True) if not ok]
    inputs = tensors_of(x)
    own_known, bound_known = [*inputs, *own.out], [*inputs, *bound.out]
    buffers: dict[int, tuple[int, int]] = {}  # of the bound path, by their address on Triton's own
    for have, want in zip(bound.launches, own.launches, strict=True):
        for a, b in zip(have.args, want.args, strict=True):
            if not isinstance(b, Tensor):
                assert a == b
                assert type(a) is type(b)
            elif (found := place(b, own_known)) is not None:
                number, shift = found
                assert a == bound_known[number].data_ptr() + shift
            elif b.numel():
                assert buffers.setdefault(b.data_ptr(), (a, b.nbytes)) == (a, b.nbytes)
    assert_apart(list(buffers.values()), bound.memory)


def assert_apart(buffers: list[tuple[int, int]], memory: list[Tensor]) -> None:
    """Buffers (address, bytes) are aligned, inside the memory, and none reaches into another."""
    for address, size in buffers:
        assert address % 16 == 0
        assert any(m.data_ptr() <= address and address + size <= m.data_ptr() + m.nbytes for m in memory)
    for (address, size), (other, _) in itertools.pairwise(sorted(buffers)):
        assert address + size <= other


def check(driver: Recorder, function: Callable[[Any], Any], *inputs: Any) -> None:
    """Run inputs one after another, whatever is bound by then; beside each a plan of its own, launched by Triton."""
    for x in inputs:
        runs = [run(driver, function, x) for _ in range(2)]
        with watched(), mock.patch.object(launch, "_plans", {}):
            own = run(driver, function, x)
        assert own.launches
        assert not own.is_bound
        assert runs[1].is_bound
        for have in runs:
            if have.is_bound:
                assert_equal_launches(have, own, x)
            else:
                assert [a[:5] for a in have.launches] == [b[:5] for b in own.launches]


def in_memory(x: Tensor, start: int, step: int = 1, last: int = -1) -> Tensor:
    """``x``, ``start`` elements from the beginning of its memory, ``step`` times as wide along dimension ``last``."""
    if x.dim() == 0:
        return x.new_zeros(start + 1)[start:].view(())
    shape = list(x.shape)
    shape[last] *= step
    flat = x.new_zeros(torch.Size(shape).numel() + start)[start:].view(shape)
    return flat.narrow(last, 0, shape[last])[(slice(None),) * (last % x.dim()) + (slice(None, None, step),)]


def each_tensor_changed(x: Any, change: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    for number in range(len(tensors_of(x))):
        counter = itertools.count()
        yield with_tensors(x, lambda t, c=counter, at=number: change(t) if next(c) == at else t)


EVERY_OPERATION = pytest.mark.parametrize("name", INPUTS)


@EVERY_OPERATION
def test_any_offset_of_any_tensor(driver, name):
    x, function = INPUTS[name](torch.float32), getattr(kernels, name)
    check(driver, function, x)
    for start in range(1, 16):
        check(driver, function, *each_tensor_changed(x, lambda t, n=start: in_memory(t, n)))
    check(driver, function, x)


@EVERY_OPERATION
def test_any_stride_of_any_tensor(driver, name):
    x, function = INPUTS[name](torch.float32), getattr(kernels, name)
    check(driver, function, x)
    most = max(t.dim() for t in tensors_of(x))
    for last, step in itertools.product(range(most), (2, 3, 16)):
        check(driver, function, *each_tensor_changed(x, lambda t, d=last, s=step: in_memory(t, 0, s, d) if d < t.dim() else t))
    flipped = each_tensor_changed(x, lambda t: t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2))
    check(driver, function, *flipped, x)


@EVERY_OPERATION
def test_any_type_of_any_tensor(driver, name):
    x, function = INPUTS[name](torch.float32), getattr(kernels, name)
    check(driver, function, x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check(driver, function, *each_tensor_changed(x, lambda t, d=dtype: t.to(d) if t.is_floating_point() else t))
        check(driver, function, with_tensors(x, lambda t, d=dtype: t.to(d) if t.is_floating_point() else t))
    check(driver, function, x)


def levels(*shapes: tuple[int, int], strides: tuple[float, ...] = (8.0, 16.0)) -> of.Levels:
    return of.Levels(tuple(side for shape in shapes for side in shape), strides)


def ground_truth(num_rows: int, *, is_raw: bool = True) -> list[Tensor]:
    if is_raw:
        return [torch.rand(num_rows, 6)]
    integers = torch.zeros(num_rows, dtype=torch.int64)
    return [integers, integers.clone(), torch.rand(num_rows, 4), torch.rand(num_rows, 4)]


def yolo11(
    *, batch_size=2, num_classes=3, reg_max=4, topk=10, topk2=None, alpha=0.5, min_box_side=0.0, gains=(7.5, 0.5, 1.5),
    shapes=((4, 4), (2, 2)), strides=(8.0, 16.0), num_rows=5, is_raw=True, has_weights=False, wants_grad=True,
    wants_row=False,
):  # fmt: skip
    num_anchors = sum(h * w for h, w in shapes)
    rule = of.TaskAligned(topk, topk2, alpha, 6.0, min_box_side, 1e-9)
    return of.YOLO11(
        torch.rand(batch_size, num_anchors, 4 * reg_max), torch.rand(batch_size, num_anchors, num_classes),
        ground_truth(num_rows, is_raw=is_raw), torch.rand(num_classes) if has_weights else None,
        levels(*shapes, strides=strides), reg_max, rule, gains, wants_grad, wants_row,
    )  # fmt: skip


def yolox(
    *, batch_size=2, num_classes=3, candidates="center", radius=1.5, iou_loss="iou", iou_gain=5.0, shapes=((4, 4), (2, 2)),
    strides=(8.0, 16.0), num_rows=5, is_raw=True, wants_grad=True,
):  # fmt: skip
    num_anchors = sum(h * w for h, w in shapes)
    return of.YOLOX(
        torch.rand(batch_size, num_anchors, 5 + num_classes), ground_truth(num_rows, is_raw=is_raw), torch.zeros(()),
        levels(*shapes, strides=strides), of.SimOTA(candidates, radius), iou_loss, iou_gain, wants_grad,
    )  # fmt: skip


SIZES = (
    {"shapes": ((4, 4), (2, 2)), "strides": (8.0, 32.0)}, {"shapes": ((8, 2), (2, 2))}, {"shapes": ((2, 8), (2, 2))},
    {"shapes": ((16, 16), (8, 8))}, {"shapes": ((1, 1),), "strides": (8.0,)}, {"strides": (3.5, 7.0)}, {"batch_size": 1},
    {"batch_size": 16}, {"num_classes": 1}, {"num_classes": 16}, {"num_classes": 80}, {"wants_grad": False}, {"is_raw": False},
    *({"num_rows": n, "is_raw": is_raw} for n in (0, 1, 2, 15, 16, 17, 128, 10_000, 10_240) for is_raw in (True, False)),
)  # fmt: skip
YOLO11_SETTINGS = (
    *SIZES, {"reg_max": 1}, {"reg_max": 16}, {"topk": 1}, {"topk": 16}, {"topk": 99}, {"topk2": 1}, {"alpha": 1.0},
    {"min_box_side": 16.0}, {"gains": (1.0, 0.5, 1.5)}, {"gains": (7.5, 1.0, 16.0)}, {"has_weights": True},
    {"wants_row": True},
)  # fmt: skip
YOLOX_SETTINGS = (
    *SIZES, {"candidates": "box_and_center"}, {"radius": 2.5}, {"iou_loss": "giou"}, {"iou_gain": 1.0}, {"iou_gain": 16.0},
)  # fmt: skip


def assignment_of(x: of.YOLO11) -> of.YOLO11Assign:
    return of.YOLO11Assign(x.pred_dist, x.pred_scores, x.targets, x.levels, x.reg_max, x.assigner)


def x_assignment_of(x: of.YOLOX) -> of.YOLOXAssign:
    return of.YOLOXAssign(x.preds, x.targets, x.levels, x.assigner)


@pytest.mark.parametrize("changes", YOLO11_SETTINGS, ids=str)
@pytest.mark.parametrize("comes_first", [False, True])
def test_any_size_and_setting_of_yolo11(driver, changes, comes_first):
    """Before, or after everything is bound for others that differ in one thing."""
    inputs = [yolo11(**changes), yolo11(), yolo11(**changes)][comes_first ^ 1 :]
    check(driver, kernels.yolo11_criterion, *inputs)
    check(driver, kernels.yolo11_assign, *map(assignment_of, inputs))
    given = list(map(given_yolo11, inputs))
    check(driver, kernels.yolo11_loss, *given)
    check(driver, kernels.yolo11_loss_backward, *[operations.gradient_of(x, x.allocate()) for x in given])


def oriented(x: of.YOLO11) -> of.YOLO11OBB:
    """The same criterion of boxes with angles."""
    angle = torch.rand(*x.pred_dist.shape[:2], 1)
    *others, boxes = x.targets
    targets = [*others, torch.cat([boxes, torch.rand(len(boxes), 1)], 1)]
    options = x.class_weights, x.levels, x.reg_max, x.assigner, (*x.gains, 1.0), x.wants_grad
    return of.YOLO11OBB(x.pred_dist, angle, x.pred_scores, targets, *options)


@pytest.mark.parametrize("changes", [*SIZES[::3], {"topk2": 1}, {"reg_max": 1}, {"gains": (1.0, 0.5, 16.0)}], ids=str)
def test_any_size_and_setting_of_oriented_boxes(driver, changes):
    inputs = [oriented(yolo11(**changed)) for changed in (changes, {}, changes)]
    check(driver, kernels.yolo11_obb_criterion, *inputs)
    preds = [(x.pred_dist, x.pred_angle, x.pred_scores) for x in inputs]
    given = [(x.targets, x.levels, x.reg_max, x.assigner) for x in inputs]
    check(driver, kernels.yolo11_obb_assign, *[of.YOLO11OBBAssign(*p, *g) for p, g in zip(preds, given, strict=True)])


@pytest.mark.parametrize("changes", YOLOX_SETTINGS, ids=str)
@pytest.mark.parametrize("comes_first", [False, True])
def test_any_size_and_setting_of_yolox(driver, changes, comes_first):
    inputs = [yolox(**changes), yolox(), yolox(**changes)][comes_first ^ 1 :]
    check(driver, kernels.yolox_criterion, *inputs)
    check(driver, kernels.yolox_assign, *map(x_assignment_of, inputs))
    given = list(map(given_yolox, inputs))
    check(driver, kernels.yolox_loss, *given)
    check(driver, kernels.yolox_loss_backward, *[operations.gradient_of(x, x.allocate()) for x in given])


def given_yolo11(x: of.YOLO11) -> of.YOLO11Loss:
    out = assignment_of(x).allocate()
    return of.YOLO11Loss(
        x.pred_dist, x.pred_scores, out.target_row, out.target_score, out.sums, out.gt_labels, out.gt_boxes, x.class_weights,
        x.levels, x.reg_max, x.gains,
    )  # fmt: skip


def given_yolox(x: of.YOLOX) -> of.YOLOXLoss:
    out = x_assignment_of(x).allocate()
    return of.YOLOXLoss(
        x.preds, out.target_row, out.matched_iou, out.matched_iou.new_zeros(()), out.gt_labels, out.gt_boxes, x.l1_gain,
        x.levels, x.iou_loss, x.iou_gain,
    )  # fmt: skip


class Scaled(NamedTuple):
    grad: Tensor
    grads: list[Tensor]


def scale(x: Scaled) -> list[Tensor]:
    kernels.scale_(x.grads, x.grad)
    return x.grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scaling_of_any_gradients(driver, dtype):
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    base = Scaled(one, [torch.rand(2, 20, 8).to(dtype), torch.rand(2, 20, 3).to(dtype)])
    check(driver, scale, base, Scaled(one, base.grads[:1]), base)
    check(driver, scale, Scaled(one, [torch.rand(1, 1, 1).to(dtype), torch.rand(1, 1, 16).to(dtype)]), base)
    for start in range(1, 16):  # the factor may lie anywhere; gradients are the package's own
        check(driver, scale, Scaled(in_memory(one, start), base.grads), base)


def test_raw_and_packed_ground_truth_of_every_number_of_rows_share_plans(driver):
    for num_rows in (1, 2, 3, 100):
        kernels.yolo11_criterion(yolo11(num_rows=num_rows))
        kernels.yolo11_criterion(yolo11(num_rows=num_rows, is_raw=False))
    assert len(launch._plans) == 2


# ---- the way back to Triton


@EVERY_OPERATION
def test_everything_goes_through_triton_while_somebody_watches(driver, name):
    """From the first run on, and after bound ones."""
    x, function = INPUTS[name](torch.float32), getattr(kernels, name)
    with watched():
        first = run(driver, function, x)
        second = run(driver, function, x)
    bound = run(driver, function, x)
    with watched():
        last = run(driver, function, x)
    assert bound.is_bound
    for own in (first, second, last):
        assert not own.is_bound
        assert own.memory == []
        assert_equal_launches(bound, own, x)


@EVERY_OPERATION
def test_everything_goes_through_triton_where_nothing_can_be_bound(driver, name, monkeypatch):
    x, function = INPUTS[name](torch.float32), getattr(kernels, name)
    bound = [run(driver, function, x) for _ in range(2)][1]
    launch._plans.clear()
    monkeypatch.setattr(launch, "_bound", lambda *_: None)
    for _ in range(3):
        own = run(driver, function, x)
        assert not own.is_bound
        assert_equal_launches(bound, own, x)


@pytest.mark.parametrize("missing", ["run", "function", "packed_metadata"])
def test_a_kernel_that_lacks_something_is_not_bound(missing):
    whole = {"run": print, "function": 1, "packed_metadata": ()}
    assert launch._bound(SimpleNamespace(**whole), (3,)) == (print, 1, (), (3,))
    del whole[missing]
    assert launch._bound(SimpleNamespace(**whole), (3,)) is None
    assert launch._bound(None, ()) is None  # the interpreter's


def test_outputs_that_are_not_aligned_go_through_triton(driver):
    """The gradients that ``scale_`` changes are its outputs."""
    x = Scaled(torch.ones(()), [in_memory(torch.rand(2, 20, 8), 1), torch.rand(2, 20, 3)])
    for _ in range(3):
        assert not run(driver, scale, x).is_bound


# ---- memory


BUFFERS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.sampled_from([torch.uint8, torch.float16, torch.int32, torch.int64, torch.float64]), st.integers(0, 50)),
)


@given(BUFFERS, BUFFERS, st.integers(0, 200) | st.integers(0, 20_000))
def test_buffers_of_a_workspace_are_apart(fixed, by_row, num_rows):
    by_row = {f"row_{name}": buffer for name, buffer in by_row.items()}
    workspace = Workspace(fixed, by_row)
    tensors = workspace.tensors(DEVICE, num_rows)
    memory, addresses = workspace.addresses(DEVICE, num_rows)
    if memory is None:
        assert fixed == by_row == {}
        return
    assert tensors._fields == addresses._fields == (*fixed, *by_row)
    for tensor, (dtype, count) in zip(tensors, [*fixed.values(), *by_row.values()], strict=True):
        assert tensor.dtype == dtype
        assert tensor.numel() in (count, count * num_rows)
    assert_apart([(at, tensor.nbytes) for at, tensor in zip(addresses, tensors, strict=True) if tensor.numel()], [memory])


def live_tensors() -> int:
    gc.collect()
    return sum(type(x) is Tensor for x in gc.get_objects())


def test_plans_hold_no_tensor(driver):
    before = live_tensors()
    for name, make in INPUTS.items():
        x = make(torch.float32)
        for _ in range(2):
            getattr(kernels, name)(x)
    assert len(launch._plans) >= len(INPUTS)
    del x
    assert live_tensors() == before


def test_plans_are_bounded_and_made_again(driver, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_PLANS", 3)
    for _ in range(2):
        for batch_size in range(1, 7):
            check(driver, kernels.yolo11_criterion, yolo11(batch_size=batch_size))
            assert len(launch._plans) <= 3


# ---- threads


def test_threads_that_launch_at_the_same_time(driver):
    """Two of one shape and two of others, from the first run on, while plans come and go."""
    inputs = [yolo11(), yolo11(), yolo11(batch_size=3, num_rows=0), yolo11(num_classes=16, shapes=((8, 8), (4, 4)))]
    expected = []
    for x in inputs:
        with watched():
            expected.append(run(driver, kernels.yolo11_criterion, x))
    barrier, found = threading.Barrier(len(inputs)), [[] for _ in inputs]

    def work(number: int) -> None:
        for _ in range(40):
            barrier.wait()
            launch._plans.clear()
            for _ in range(3):
                with driver.recording() as launches:
                    out = kernels.yolo11_criterion(inputs[number])
                found[number].append(Ran(out, launches, []))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, runs in zip(expected, found, strict=True):
        assert len(runs) == 120
        for have in runs:
            assert [a[:5] for a in have.launches] == [b[:5] for b in own.launches]
    assert any(have.is_bound for runs in found for have in runs)
