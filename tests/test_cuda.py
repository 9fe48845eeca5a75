"""What only a CUDA device can show: no synchronisation, graphs that are captured and replayed, and many equal repeats."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.compare import assert_close
from tests.conftest import DEVICE
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
