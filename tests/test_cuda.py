"""What only a CUDA device can show: no synchronisation, graphs that are captured and replayed, and many equal repeats."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bench import peers
from tests.compare import assert_close
from tests.conftest import DEVICE
from tests.test_graphs import CHANNELS, TASKS, WARMUP, Setup, images_of, rows_of
from tests.test_training_loops import ROWS, SYSTEMS, loss_of, make_criterion, make_inputs, make_model, padded

ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
REPEATS = 200 if DEVICE.type == "cuda" else 5


def train_step(criterion: nn.Module, model: nn.Module, inputs: Tensor, rows: Tensor) -> list[Tensor]:
    """The loss and the gradients of the weights."""
    loss = loss_of(criterion, model(inputs), rows)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # a prototype, it says
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("system", SYSTEMS)
def test_repeats_are_equal_to_the_bit(system):
    args = (make_criterion(system).to(DEVICE), make_model(system), make_inputs(), ROWS.to(DEVICE))
    preds = args[1](args[2]).detach()
    first = None
    for _ in range(REPEATS):
        leaf = preds.clone().requires_grad_()
        loss = loss_of(args[0], leaf, args[3])
        result = (loss.detach(), *torch.autograd.grad(loss, leaf))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


@ON_CUDA
@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_waits_for_the_device(system):
    args = (make_criterion(system).to(DEVICE), make_model(system), make_inputs(), ROWS.to(DEVICE))
    expected = train_step(*args)
    with no_synchronisation():
        actual = train_step(*args)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "step")


@ON_CUDA
@pytest.mark.parametrize("task", TASKS)
def test_nothing_waits_for_the_device_in_other_tasks(task):
    setup = graphed(task)
    batch = batch_of(1, of=setup)
    expected = gradients_of(setup, setup.forward, batch)
    setup.model.zero_grad()
    with no_synchronisation():
        setup.forward(*batch).loss.backward()
    for p, want in zip([p for p in setup.model.parameters() if p.grad is not None], expected, strict=True):
        assert_close(p.grad, want, "gradient")


@ON_CUDA
def test_the_check_notices_a_synchronisation():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        ROWS.to(DEVICE).sum().item()


@ON_CUDA
@pytest.mark.parametrize("system", SYSTEMS)
def test_cuda_graph(system):
    """Forward and backward captured once and replayed with other images and other numbers of boxes."""
    criterion, model, inputs = make_criterion(system).to(DEVICE), make_model(system), make_inputs()
    rows = padded(ROWS, 9).to(DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_of(criterion, model(inputs), rows).backward()
            model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(criterion, model(inputs), rows)
        loss.backward()
        loss = loss.detach()  # the graph of its gradient would tie the weights to the stream of the capture
    captured = [p.grad for p in model.parameters()]
    for number in (4, 0, 2):
        inputs.copy_(make_inputs(number))
        rows.copy_(padded(ROWS[:number], 9))
        graph.replay()
        actual = [loss.clone(), *(grad.clone() for grad in captured)]
        for a, b in zip(actual, train_step(criterion, model, inputs, ROWS[:number]), strict=True):
            assert_close(a, b, "replay")


def graphed(system: str = "yolo11") -> Setup:
    """A model, a criterion and their step as graphs, without dropout."""
    setup = Setup(system)
    for module in (setup.model, setup.criterion):
        module.to(DEVICE)
    setup.model.drop.p = 0.0
    return setup


def batch_of(seed: int, number: int = 5, side: int = 32, of: Setup | None = None) -> tuple[Any, Any]:
    batch = of.batch_of(seed, number, side) if of else (images_of(seed, side=side), rows_of(seed, number))
    return tree_map(lambda x: x.to(DEVICE), batch)


def gradients_of(setup: Setup, step: Callable[..., Any], *batches: tuple[Any, Any]) -> list[Tensor]:
    """Summed over batches; with the buffers of the model put back."""
    state = copy.deepcopy(setup.model.state_dict())
    setup.model.zero_grad()
    for batch in batches:
        step(*batch).loss.backward()
    setup.model.load_state_dict(state)
    return [p.grad.clone() for p in setup.model.parameters() if p.grad is not None]


def assert_step_is_right(setup: Setup, *batches: tuple[Any, Any], is_replayed: bool = True) -> None:
    before = setup.step.num_replays
    actual = gradients_of(setup, setup.step, *batches)
    assert setup.step.num_replays - before == len(batches) * is_replayed
    for a, b in zip(actual, gradients_of(setup, setup.forward, *batches), strict=True):
        assert_close(a, b, "gradient")


def warm_up(setup: Setup, number: int = 5, side: int = 32) -> None:
    for seed in range(WARMUP + 1):
        setup.step(*batch_of(seed, number, side)).loss.backward()


@ON_CUDA
@pytest.mark.parametrize("system", CHANNELS)
def test_graphed_step(system):
    """While older losses live, with other images and boxes, accumulated, after steps of an optimiser."""
    setup = graphed(system)
    kept = [setup.step(*batch_of(seed, of=setup)).loss for seed in range(WARMUP)]
    for loss in kept:
        loss.backward()
    kept.append(setup.step(*batch_of(8, of=setup)).loss)
    assert setup.step.num_replays == 1
    for _ in range(3):
        assert_step_is_right(setup, *[batch_of(number, number, of=setup) for number in (5, 0, 100)])
        setup.optimizer.step()
    assert int(setup.model.norm.num_batches_tracked) == WARMUP + 1


@ON_CUDA
@pytest.mark.parametrize("system", SYSTEMS)
def test_graphed_step_under_autocast_and_a_scaler(system):
    setup, scaler, losses = graphed(system), torch.amp.GradScaler("cuda", init_scale=2.0**8), []
    for step in (setup.step, setup.forward):
        state = copy.deepcopy(setup.model.state_dict())
        for seed in range(6):
            setup.optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                out = step(*batch_of(seed))
            scaler.scale(out.loss).backward()
            scaler.step(setup.optimizer)
            scaler.update()
            losses.append(out.loss.detach())
        setup.model.load_state_dict(state)
        setup.optimizer.state.clear()
    assert setup.step.num_replays == 6 - WARMUP
    assert scaler.get_scale() == 2.0**8
    torch.testing.assert_close(losses[:6], losses[6:], rtol=1e-2, atol=1e-2)


@ON_CUDA
def test_graphs_share_their_memory():
    """Of two shapes and two numbers of rows; also after all were dropped."""
    setup = graphed()
    for _ in range(2):
        for side, number in ((32, 5), (64, 5), (32, 200)):
            warm_up(setup, number, side)
        for side in (32, 64, 32, 64):
            assert_step_is_right(setup, batch_of(7, side=side))
        setup.step.release()


@ON_CUDA
def test_graphed_dropout_draws_new_numbers():
    setup, batch = graphed(), batch_of(1)
    warm_up(setup)
    setup.model.drop.p = 0.5
    setup.model.drop.eval()  # a change, so that the step is recorded again
    warm_up(setup)
    assert_step_is_right(setup, batch)
    setup.model.drop.train()
    warm_up(setup)
    before = setup.step.num_replays
    losses = {setup.step(*batch).loss.item() for _ in range(8)}
    assert setup.step.num_replays == before + 8
    assert len(losses) == 8


@ON_CUDA
def test_graphed_step_reads_the_switch_of_l1():
    setup = graphed("yolox")
    warm_up(setup)
    setup.criterion.use_l1 = True
    assert_step_is_right(setup, batch_of(1))
    assert setup.step(*batch_of(1)).l1 > 0


@ON_CUDA
@pytest.mark.parametrize("how", ["a number", "a wait"])
def test_what_breaks_a_recording_leaves_the_device_usable(how):
    setup, forward, done = graphed(), None, []
    forward = setup.model.forward

    def broken(images: Tensor) -> Tensor:
        preds = forward(images)
        done.append(preds.sum().item() if how == "a number" else torch.cuda.synchronize())
        return preds

    setup.model.forward = broken
    setup.model.drop.p = 0.5
    with pytest.warns(UserWarning, match="no CUDA graph of the training step"):
        warm_up(setup)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.rand(4, device=DEVICE).isfinite().all()
    setup.step(*batch_of(1)).loss.backward()
    setup.model.drop.p = 0.0
    assert_step_is_right(setup, batch_of(2), is_replayed=False)
    other = graphed()
    warm_up(other)
    assert_step_is_right(other, batch_of(1))


@ON_CUDA
def test_a_criterion_left_on_the_cpu_is_named():
    setup = graphed("yolox")
    setup.criterion.cpu()
    with pytest.warns(UserWarning, match="YOLOXLoss is on cpu, the images are on cuda:0"):
        setup.step(*batch_of(1))


@ON_CUDA
@pytest.mark.skipif(not peers.is_installed("ultralytics"), reason="ultralytics is not installed")
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n", "yolo11n-obb", "yolo11n-pose", "yolo11n-seg"])
def test_graphed_steps_of_ultralytics(name, monkeypatch):
    with peers.contained():
        from ultralytics.engine.trainer import BaseTrainer

        from triton_yolo.integrations import _ultralytics_graphs, ultralytics

        monkeypatch.setattr(BaseTrainer, "train", lambda self: self.work())
        made, make = [], _ultralytics_graphs.GraphedStep
        monkeypatch.setattr(_ultralytics_graphs, "GraphedStep", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
        make_model = peers.ultralytics_pose_model if "pose" in name else peers.ultralytics_model
        model = make_model(f"{name}.yaml", 3).to(DEVICE)
        model.criterion = model.init_criterion()

        def losses() -> list[Tensor]:
            state, found = copy.deepcopy(model.state_dict()), []
            for seed in range(6):
                images, rows = batch_of(seed, side=64)
                boxes = rows[:, [2, 3, 4, 5, 2]] if "obb" in name else rows[:, 2:]
                batch = {"img": images, "batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": boxes}
                batch["keypoints"] = rows[:, None, 2:5].expand(-1, 17, -1)
                batch["masks"] = (4 * images[:, 0, ::4, ::4]).byte()
                model.zero_grad()
                loss = model(batch)[0].sum()
                loss.backward()
                found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            model.load_state_dict(state)
            return found

        with ultralytics.patched(cuda_graph=True):
            actual: list[Tensor] = []
            BaseTrainer.train(SimpleNamespace(args=model.args, work=lambda: actual.extend(losses())))
            assert made[0].num_replays == 2
            expected = losses()
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6
