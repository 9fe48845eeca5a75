"""Training steps as graphs, which a recorder stands in for: what a step computes, and what becomes of all around it."""

import contextlib
import copy
import gc
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import triton_yolo as ty
from tests.recorder import Recorder, recorded
from triton_yolo import _recording
from triton_yolo.graphs import GraphedStep

SYSTEMS = ("yolo11", "yolox")
REG_MAX, NUM_CLASSES, WARMUP = 4, 3, 2
BOXES = (4 * REG_MAX, NUM_CLASSES)
CHANNELS = {
    "yolo11": BOXES, "yolox": (5 + NUM_CLASSES,), "obb": (4 * REG_MAX, 1, NUM_CLASSES), "pose": (*BOXES, 5 * 3),
    "masks": (*BOXES, 4, 4), "masks a row": (*BOXES, 4, 4),
}  # fmt: skip
"""Of the parts of the predictions; the last of masks are the prototypes."""
TASKS = tuple(CHANNELS)[2:]


class Model(nn.Module):
    """A batch norm, a dropout, and a layer that nothing uses."""

    def __init__(self, system: str) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.Dropout(0.3)
        self.head, self.unused = nn.Conv2d(8, sum(CHANNELS[system]), 1), nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.stem(images)))).flatten(2).transpose(1, 2)


class Setup:
    """A model, a criterion, and the step of both as it is and as graphs."""

    def __init__(self, system: str = "yolo11", **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.system = Model(system), system
        self.criterion = make_criterion(system)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.step = GraphedStep(self.forward, self.model, self.criterion, warmup=WARMUP, **options)

    def forward(self, images: Any, targets: Any) -> Any:
        return self.loss(self.model(images if isinstance(images, Tensor) else images[0]), images, targets)

    def loss(self, preds: Tensor, images: Any, targets: Any) -> Any:
        images, *masks = (images,) if isinstance(images, Tensor) else images
        shape = images.shape[2] // 8, images.shape[3] // 8
        parts = list(preds.split(CHANNELS[self.system], -1))
        if "masks" in self.system:
            parts[-1] = parts[-1].transpose(1, 2).unflatten(2, shape)
        rows = (targets["rows"], *targets["others"]) if isinstance(targets, dict) else (targets,)
        return self.criterion(*parts, [shape], *rows, *masks)

    def batch_of(self, seed: int, number: int = 5, side: int = 32) -> tuple[Any, Any]:
        """Images and targets of the task."""
        images, rows = images_of(seed, side=side), rows_of(seed, number)
        generator = torch.Generator().manual_seed(seed)
        if self.system == "obb":
            return images, torch.cat([rows, torch.rand(number, 1, generator=generator)], 1)
        if self.system == "pose":
            return images, {"rows": rows, "others": [torch.rand(number, 5, 3, generator=generator).round(decimals=1)]}
        masks = torch.randint(3, (4 if self.system == "masks" else number, side // 4, side // 4), generator=generator)
        if self.system == "masks":
            return (images, masks.byte()), rows
        return (images, {"rows": rows, "others": [masks == 1]}) if self.system == "masks a row" else (images, rows)

    def replay(self, number: int = 1) -> None:
        """Take steps until they are replayed."""
        before = self.step.num_replays
        for index in range(WARMUP + number):
            self.step(*self.batch_of(index)).loss.backward()
        assert self.step.num_replays - before >= number

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def make_criterion(system: str) -> nn.Module:
    options: dict[str, Any] = {"num_classes": NUM_CLASSES, "strides": (8,)}
    if system == "yolox":
        return ty.YOLOXLoss(**options)
    options.update(reg_max=REG_MAX, class_weights=torch.ones(NUM_CLASSES))
    if "masks" in system:
        return ty.YOLO11SegmentationLoss(**options, overlap_mask=system == "masks")
    return {"yolo11": ty.YOLO11Loss, "obb": ty.YOLO11OBBLoss, "pose": ty.YOLO11PoseLoss}[system](**options)


def images_of(seed: int, batch_size: int = 4, side: int = 32) -> Tensor:
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(seed))


def rows_of(seed: int, number: int = 5, batch_size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 0.2 + 0.4 * torch.rand(number, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(number, 2, generator=generator)
    image, label = torch.arange(number) % batch_size, torch.arange(number) % NUM_CLASSES
    return torch.cat([image[:, None], label[:, None], centre, size], 1)


@pytest.fixture(params=SYSTEMS)
def setup(request):
    made = Setup(request.param)
    with recorded(made.model, made.criterion):
        yield made


@pytest.fixture
def yolo11():
    made = Setup()
    with recorded(made.model, made.criterion):
        yield made


def assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def gradients_of(setup: Setup, step: Any, seed: int, number: int = 5) -> list[Tensor | None]:
    setup.model.zero_grad()
    torch.manual_seed(seed)
    step(*setup.batch_of(seed, number)).loss.backward()
    return setup.gradients()


def assert_step_is_right(setup: Setup, seed: int = 9) -> None:
    """Gradients as without a graph; with the batch norm's numbers put back in between."""
    state = copy.deepcopy(setup.model.state_dict())
    actual = gradients_of(setup, setup.step, seed)
    setup.model.load_state_dict(state)
    assert_equal(actual, gradients_of(setup, setup.forward, seed))


def train(setup: Setup, step: Any, steps: int = 8) -> list[Tensor]:
    torch.manual_seed(3)
    for index in range(steps):
        out = step(*setup.batch_of(index, number=index % 4))
        setup.optimizer.zero_grad()
        out.loss.backward()
        setup.optimizer.step()
    return [*out, *setup.gradients(), *setup.model.state_dict().values()]


@pytest.mark.parametrize("system", CHANNELS)
def test_a_training_is_the_same(system):
    """Losses, gradients, weights and the batch norm's statistics; dropout draws what it would have drawn."""
    one, other = Setup(system), Setup(system)
    with recorded(one.model, one.criterion):
        assert_equal(train(one, one.step), train(other, other.forward))
    assert one.step.num_replays == 8 - WARMUP
    assert int(one.model.norm.num_batches_tracked) == 8


def test_output_has_the_form_of_the_criterion_and_is_the_callers_own(setup):
    setup.replay()
    first = setup.step(images_of(0), rows_of(0))
    assert type(first) is (ty.YOLO11LossOutput if setup.system == "yolo11" else ty.YOLOXLossOutput)
    assert [x.requires_grad for x in first] == [True] + [False] * (len(first) - 1)
    kept = [x.detach().clone() for x in first]
    setup.step(images_of(1), rows_of(1))
    assert_equal([x.detach() for x in first], kept)


def test_gradients_accumulate(setup):
    setup.replay()
    state, sums = copy.deepcopy(setup.model.state_dict()), []
    for step in (setup.step, setup.forward):
        setup.model.load_state_dict(state)
        setup.model.zero_grad()
        torch.manual_seed(0)
        for seed in (1, 2, 3):
            (step(images_of(seed), rows_of(seed)).loss / 3).backward()
        sums.append(setup.gradients())
    assert_equal(*sums)


def test_gradients_belong_to_the_parameters(setup):
    """A gradient that somebody keeps does not change with the next step."""
    setup.replay()
    kept = gradients_of(setup, setup.step, 1)
    held = [p.grad for p in setup.model.parameters()]
    gradients_of(setup, setup.step, 2)
    assert_equal(held, kept)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(setup, set_to_none):
    setup.replay()
    setup.model.zero_grad(set_to_none=set_to_none)
    setup.model.unused.zero_grad()
    torch.manual_seed(9)
    state = copy.deepcopy(setup.model.state_dict())
    setup.step(images_of(9), rows_of(9)).loss.backward()
    actual = setup.gradients()
    setup.model.load_state_dict(state)
    assert_equal(actual, gradients_of(setup, setup.forward, 9))


def test_grad_scaler(setup):
    setup.replay()
    expected = gradients_of(setup, setup.step, 1)
    setup.model.zero_grad()
    torch.manual_seed(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(setup.step(images_of(1), rows_of(1)).loss).backward()
    assert_equal(setup.gradients(), [None if x is None else x * 2**10 for x in expected])
    scaler.unscale_(setup.optimizer)
    assert_equal(setup.gradients(), expected)


def test_a_loss_of_several_parts(yolo11):
    """Each output may have a gradient; one that is not used has none."""
    model, shapes = yolo11.model, [(4, 4)]

    def forward(images: Tensor, targets: Tensor) -> dict[str, Any]:
        preds = model(images)
        dist, scores = preds.split([4 * REG_MAX, NUM_CLASSES], -1)
        return {"loss": yolo11.criterion(dist, scores, shapes, targets).loss, "size": preds.square().mean(), "name": "two"}

    step = GraphedStep(forward, model, yolo11.criterion, warmup=1)
    for parts in (("loss",), ("loss", "size"), ("size",), ("size",)):
        results = []
        for run in (step, forward):
            model.zero_grad()
            torch.manual_seed(1)
            out = run(images_of(1), rows_of(1))
            assert out["name"] == "two"
            sum(out[part] for part in parts).backward()
            results.append(yolo11.gradients())
        assert_equal(*results)
    assert step.num_replays == 3


@pytest.mark.parametrize("form", ["rows", "targets", "columns"])
def test_forms_of_targets(yolo11, form):
    def forward(images: Tensor, targets: Any) -> Any:
        if form == "columns":
            targets = torch.cat([targets["image"][:, None], targets["cls"][:, None], targets["box"]], 1)
        return yolo11.forward(images, targets)

    def targets_of(seed: int, number: int = 5) -> Any:
        rows = rows_of(seed, number)
        if form == "targets":
            return ty.Targets.from_yolo(rows, 32)
        return {"image": rows[:, 0], "cls": rows[:, 1], "box": rows[:, 2:]} if form == "columns" else rows

    step = GraphedStep(forward, yolo11.model, yolo11.criterion, warmup=1)
    yolo11.model.drop.p = 0.0
    for seed, number in enumerate((5, 2, 7, 0)):
        actual = step(images_of(seed), targets_of(seed, number)).loss
        assert torch.equal(actual, yolo11.forward(images_of(seed), rows_of(seed, number)).loss)
    assert step.num_replays == 3


def test_targets_are_padded_to_what_the_largest_batch_needed(yolo11):
    seen, forward = [], yolo11.criterion.forward
    yolo11.criterion.forward = lambda *args: seen.append(len(args[-1])) or forward(*args)
    for number in (0, 5, 128, 129, 3, 3, 3):
        yolo11.step(images_of(number), rows_of(number, number)).loss.backward()
    # Two steps as they are, a recording of 128 rows and a replay; then of 256, and never of 128 again.
    assert seen == [128, 128, 128, 128, 256, 256, 256, 256, 256]
    assert Recorder.num_graphs == 4
    assert len(yolo11.step._recordings) == 1
    assert_step_is_right(yolo11)


def test_backward_of_an_older_step_is_an_error(setup):
    setup.replay()
    first, second = (setup.step(images_of(seed), rows_of(seed)) for seed in (1, 2))
    with pytest.raises(RuntimeError, match="must run once, before the next step"):
        first.loss.backward()
    second.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must run once, before the next step"):
        second.loss.backward()


def test_backward_of_a_dropped_graph_is_an_error(setup):
    setup.replay()
    out = setup.step(images_of(1), rows_of(1))
    setup.step.release()
    with pytest.raises(RuntimeError, match="must run once, before the next step"):
        out.loss.backward()


def test_shapes_that_come_seldom_run_as_they_are(setup):
    setup.replay()
    replays = setup.step.num_replays
    for _ in range(4):
        setup.step(images_of(0, batch_size=2), rows_of(0, batch_size=2)).loss.backward()
        setup.step(images_of(0), rows_of(0)).loss.backward()
    assert setup.step.num_replays - replays == 4
    assert Recorder.num_graphs == 2
    assert_step_is_right(setup)


def test_shapes_have_a_graph_each_up_to_a_number():
    setup = Setup(max_graphs=2)
    with recorded(setup.model, setup.criterion):
        for side in (32, 48, 64):
            for _ in range(WARMUP + 2):
                setup.step(images_of(1, side=side), rows_of(1)).loss.backward()
        assert setup.step.num_replays == 4
        setup.step(images_of(1, side=32), rows_of(1)).loss.backward()
        assert setup.step.num_replays == 5
        assert_step_is_right(setup)


def test_validation_runs_as_it_is(setup):
    setup.replay()
    replays = setup.step.num_replays
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not setup.step(images_of(1), rows_of(1)).loss.requires_grad
    setup.model.eval()
    assert torch.equal(setup.step(images_of(1), rows_of(1)).loss, setup.forward(images_of(1), rows_of(1)).loss)
    setup.model.train()
    images = images_of(1).requires_grad_()
    setup.step(images, rows_of(1)).loss.backward()
    assert images.grad is not None
    assert setup.step.num_replays == replays
    assert_step_is_right(setup)
    assert setup.step.num_replays == replays + 1
    assert Recorder.num_graphs == 2


def test_without_cuda_steps_run_as_they_are():
    setup, seen = Setup(), []
    setup.criterion.register_forward_pre_hook(lambda _, args: seen.append(len(args[-1])))
    for _ in range(WARMUP + 2):
        setup.step(images_of(1), rows_of(1)).loss.backward()
    assert seen == [5] * (WARMUP + 2)
    assert setup.step.num_replays == 0


def test_models_hold_nothing_of_a_graph(setup):
    keys, parameters = list(setup.model.state_dict()), list(setup.model.parameters())
    attributes = {name: set(vars(module)) for name, module in setup.model.named_modules()}
    setup.replay(3)
    assert list(setup.model.state_dict()) == keys
    assert all(a is b for a, b in zip(setup.model.parameters(), parameters, strict=True))
    assert {name: set(vars(module)) for name, module in setup.model.named_modules()} == attributes
    assert not vars(setup.model.stem.weight)
    average = copy.deepcopy(setup.model).eval()
    assert average(images_of(1)).isfinite().all()


def test_memory_of_gradients_is_shared_by_all_graphs(setup):
    for side in (32, 48):
        for _ in range(WARMUP + 1):
            setup.step(images_of(1, side=side), rows_of(1)).loss.backward()
    first, second = setup.step._recordings.values()
    assert first._used.keys() == second._used.keys()
    assert all(second._used[p] is first._used[p] for p in first._used)


def test_a_pool_that_lost_its_graphs_is_not_used_again(yolo11):
    """PyTorch refuses to."""
    for side in (32, 48):
        for _ in range(WARMUP + 1):
            yolo11.step(images_of(1, side=side), rows_of(1)).loss.backward()
    assert Recorder.num_pools == 1
    yolo11.step.release()
    yolo11.replay()
    assert Recorder.num_pools == 2


def test_hooks_of_parameters_run(setup):
    setup.replay()
    expected = gradients_of(setup, setup.step, 1)
    seen = []
    setup.model.stem.weight.register_hook(lambda gradient: gradient * 2)
    setup.model.stem.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    actual = gradients_of(setup, setup.step, 1)
    assert torch.equal(actual[0], 2 * expected[0])
    assert seen == [setup.model.stem.weight]


CHANGES = {
    "frozen": lambda x: x.model.stem.requires_grad_(False),
    "batch norm in eval": lambda x: x.model.norm.eval(),
    "a weight is in other memory": lambda x: setattr(x.model.head.weight, "data", x.model.head.weight.data.clone()),
    "a weight is another parameter": lambda x: setattr(x.model.head, "weight", nn.Parameter(x.model.head.weight.data * 2)),
    "a weight is another parameter of that memory": lambda x: setattr(
        x.model.head, "weight", nn.Parameter(x.model.head.weight.data)
    ),
    "a buffer is another tensor": lambda x: setattr(x.model.norm, "running_mean", torch.zeros(8)),
    "gains": lambda x: setattr(x.criterion, "gains", (1.0, 2.0, 3.0)),
    "class weights are another tensor": lambda x: setattr(x.criterion, "class_weights", torch.tensor([0.5, 1.0, 3.0])),
    "no class weights": lambda x: setattr(x.criterion, "class_weights", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_recorded_again(yolo11, change):
    yolo11.replay()
    CHANGES[change](yolo11)
    assert_step_is_right(yolo11)
    replays = yolo11.step.num_replays
    yolo11.replay()
    assert yolo11.step.num_replays > replays
    assert Recorder.num_graphs == 4
    assert len(yolo11.step._recordings) == 1
    assert_step_is_right(yolo11)


@pytest.mark.parametrize(
    ("task", "name", "values"),
    [("pose", "sigmas", ([0.2] * 5, [0.3] * 5)), ("masks", "mask_gain", (np.float32(2), np.float32(3)))],
)
def test_settings_of_other_types_are_recorded_again(task, name, values):
    setup = Setup(task)
    with recorded(setup.model, setup.criterion):
        for number, value in enumerate(values, 1):
            setattr(setup.criterion, name, value)
            setup.replay()
            assert Recorder.num_graphs == 2 * number


@pytest.mark.parametrize(
    ("task", "setting"),
    [
        ("obb", {"gains": (1.0, 2.0, 3.0, 4.0)}), ("pose", {"keypoint_gains": (1.0, 2.0)}), ("pose", {"sigmas": (0.3,) * 5}),
        ("masks", {"mask_gain": 2.0}),
    ],
)  # fmt: skip
def test_settings_of_other_tasks_are_recorded_again(task, setting):
    setup = Setup(task)
    with recorded(setup.model, setup.criterion):
        setup.replay()
        vars(setup.criterion).update(setting)
        assert_step_is_right(setup)
        setup.replay()
        assert Recorder.num_graphs == 4
        assert_step_is_right(setup)


def test_masks_of_another_size_are_another_shape():
    setup = Setup("masks")
    with recorded(setup.model, setup.criterion):
        setup.replay()
        (images, masks), rows = setup.batch_of(1)
        setup.step((images, masks[:, ::2, ::2]), rows).loss.backward()
        assert setup.step.num_replays == 1
        assert_step_is_right(setup)
        assert setup.step.num_replays == 2


def test_constants_are_recorded_again(yolo11):
    factor = [1.0]
    step = GraphedStep(
        lambda *args: yolo11.forward(*args).loss * factor[0],
        yolo11.model, yolo11.criterion, warmup=1, constants=lambda: factor[0],
    )  # fmt: skip
    yolo11.model.drop.p = 0.0
    for factor[0] in (1.0, 3.0):
        for _ in range(3):
            assert step(images_of(1), rows_of(1)) == yolo11.forward(images_of(1), rows_of(1)).loss * factor[0]
    assert step.num_replays == 4


@pytest.mark.parametrize(
    ("system", "change"),
    [
        ("yolox", lambda x: setattr(x.criterion, "use_l1", True)),
        ("yolo11", lambda x: x.criterion.class_weights.copy_(torch.tensor([0.5, 1.0, 3.0]))),
        ("yolo11", lambda x: x.optimizer.step()),
        ("yolo11", lambda x: x.model.load_state_dict({k: v * 2 for k, v in x.model.state_dict().items()})),
    ],
)
def test_what_changes_in_place_is_not(system, change):
    setup = Setup(system)
    with recorded(setup.model, setup.criterion):
        setup.replay()
        before, replays = gradients_of(setup, setup.step, 9), setup.step.num_replays
        change(setup)
        assert_step_is_right(setup)
        assert setup.step.num_replays == replays + 1
        assert Recorder.num_graphs == 2
        assert any(a is not None and not torch.equal(a, b) for a, b in zip(before, setup.gradients(), strict=True))


def test_autocast_is_part_of_a_recording(yolo11):
    """Its state at the call. The backward is recorded outside, as that of a loop runs."""
    seen, backward, forward = [], [], yolo11.model.forward

    def watched(images: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        preds = forward(images)
        preds.register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))
        return preds

    yolo11.model.forward = watched
    for is_enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            for _ in range(WARMUP + 1):
                loss = yolo11.step(images_of(1), rows_of(1)).loss
        loss.backward()
    assert Recorder.num_graphs == 4
    # As it is, recorded and replayed; the last three are replays.
    assert seen == 4 * [False] + 4 * [True] + 3 * [False]
    assert not any(backward)
    with torch.autocast("cpu", torch.bfloat16):
        assert_step_is_right(yolo11)


def test_recording_does_not_take_a_cast_of_older_weights(yolo11):
    """Within one autocast, the casts of the first step are kept."""
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(WARMUP):
            yolo11.step(images_of(1), rows_of(1)).loss.backward()
        with torch.no_grad():
            yolo11.model.head.weight *= 2
        actual = gradients_of(yolo11, yolo11.step, 9)
    yolo11.model.norm.reset_running_stats()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(actual, gradients_of(yolo11, yolo11.forward, 9))
    assert yolo11.step.num_replays == 1


def test_recording_has_parameters_of_its_own(yolo11):
    """A node that sums a gradient belongs to a stream; one that an older loss keeps alive must not be part of a recording."""
    seen, forward, own = [], yolo11.model.forward, yolo11.model.stem.weight
    yolo11.model.forward = lambda images: seen.append(yolo11.model.stem.weight) or forward(images)
    kept = [yolo11.step(images_of(1), rows_of(1)).loss for _ in range(WARMUP + 1)]
    assert len(kept) == WARMUP + 1
    as_it_is, (recording, replay) = seen[:WARMUP], seen[WARMUP:]
    assert all(weight is own for weight in as_it_is)
    assert own not in {recording, replay}
    assert recording.data_ptr() == replay.data_ptr() == own.data_ptr()
    assert yolo11.model.stem.weight is own


def test_a_shared_parameter_has_one_gradient(yolo11):
    yolo11.model.twin = yolo11.model.stem
    yolo11.model.again = nn.Conv2d(3, 8, 8, stride=8)
    yolo11.model.again.weight = yolo11.model.stem.weight
    forward = yolo11.model.forward
    yolo11.model.forward = lambda images: forward(images) + yolo11.model.again(images).mean()
    yolo11.replay()
    assert_step_is_right(yolo11)


class BrokenError(Exception):
    """Something in a forward pass that no graph can hold."""


def break_recordings(setup: Setup) -> None:
    forward, own = setup.model.head.forward, setup.model.head.weight

    def broken(x: Tensor) -> Tensor:
        if setup.model.head.weight is not own:
            raise BrokenError("called a synchronizing operation")
        return forward(x)

    setup.model.head.forward = broken


def test_a_step_that_cannot_be_recorded_says_so_once(setup):
    break_recordings(setup)
    parameters = list(setup.model.parameters())
    for _ in range(WARMUP):
        setup.step(images_of(0), rows_of(0)).loss.backward()
    with pytest.warns(UserWarning, match=r"runs without from now on: BrokenError: called a synchronizing operation") as caught:
        setup.step(images_of(0), rows_of(0)).loss.backward()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert int(setup.model.norm.num_batches_tracked) == WARMUP + 1
    assert all(a is b for a, b in zip(setup.model.parameters(), parameters, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_step_is_right(setup)
    assert setup.step.num_replays == 0
    assert not setup.step._gradients


def test_errors_of_a_step_that_runs_as_it_is_stay_errors(setup):
    with pytest.raises(ValueError, match=r"targets must have shape \(N, 6\)"):
        setup.step(images_of(0), torch.zeros(3, 5))
    setup.replay()


def refuse(setup: Setup, reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        gradients_of(setup, lambda *args: [setup.step(*args) for _ in range(WARMUP + 1)][-1], 0)
    assert setup.step.num_replays == 0
    assert_step_is_right(setup)


def test_a_parameter_of_no_module_is_refused(yolo11):
    """It would lose its gradient."""
    extra, forward = nn.Parameter(torch.ones(())), yolo11.model.forward
    yolo11.model.forward = lambda images: forward(images) * extra
    yolo11.step(images_of(0), rows_of(0)).loss.backward()
    assert extra.grad is not None
    refuse(yolo11, r"forward uses a parameter \(\) that is not in the modules")


def test_a_criterion_on_another_device_is_refused(yolo11):
    yolo11.criterion.register_buffer("elsewhere", torch.zeros((), device="meta"))
    refuse(yolo11, "YOLO11Loss is on meta, the images are on cpu")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (torch.ones(5, dtype=torch.uint8), "targets must be of signed types, .* got torch.uint8"),
        ("a name", "targets must be tensors, got str"),
        (torch.ones(5, device="meta"), "targets are on meta, the images are on cpu"),
        (torch.ones(4, 2), r"targets must have one row a box in all of their tensors, got \[4, 5\] rows"),
    ],
)
def test_targets_of_another_kind_are_refused(yolo11, other, reason):
    step = GraphedStep(lambda images, targets: yolo11.forward(images, targets["rows"]), yolo11.model, yolo11.criterion)
    with pytest.warns(UserWarning, match=reason):
        loss = step(images_of(0), {"rows": rows_of(0), "other": other}).loss
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("a name", "images must be tensors, got str"),
        (torch.ones(4, 8, 8, device="meta"), "images are on meta, the first of them is on cpu"),
    ],
)
def test_images_of_another_kind_are_refused(yolo11, other, reason):
    step = GraphedStep(lambda images, targets: yolo11.forward(images[0], targets), yolo11.model, yolo11.criterion)
    with pytest.warns(UserWarning, match=reason):
        loss = step([images_of(0), other], rows_of(0)).loss
    assert loss.requires_grad


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.collect()


def test_a_process_group_is_refused(setup, one_rank):
    setup.replay()
    setup.criterion.process_group = True
    with pytest.warns(UserWarning, match="has a process_group"):
        setup.step(images_of(0), rows_of(0)).loss.backward()


def test_a_model_in_ddp_is_refused(yolo11, one_rank):
    del yolo11.model.unused
    wrapped = DistributedDataParallel(yolo11.model)
    yolo11.step = GraphedStep(
        lambda images, targets: yolo11.loss(wrapped(images), images, targets), wrapped, yolo11.criterion, warmup=WARMUP
    )
    refuse(yolo11, "DistributedDataParallel averages gradients in hooks")


def test_a_sharded_model_is_refused(yolo11, one_rank):
    del yolo11.model.unused
    fully_shard(yolo11.model.stem, mesh=init_device_mesh("cpu", (1,)))
    with pytest.warns(UserWarning, match="Conv2d has a DTensor, expected plain parameters"):
        yolo11.step(images_of(0), rows_of(0)).loss.backward()
    assert yolo11.model.stem.weight.grad.full_tensor().any()


def test_ddp_around_a_step_averages_gradients(yolo11, one_rank):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = yolo11.model

        def forward(self, images: Tensor, targets: Tensor) -> Any:
            return yolo11.step(images, targets)

    def halve(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)  # as with another rank that has no gradient
        return future

    del yolo11.model.unused
    whole = DistributedDataParallel(Whole())
    whole.register_comm_hook(None, halve)
    for _ in range(WARMUP + 2):
        whole(images_of(1), rows_of(1)).loss.backward()
    state = copy.deepcopy(yolo11.model.state_dict())
    actual = gradients_of(yolo11, whole, 9)
    assert yolo11.step.num_replays == 3
    yolo11.model.load_state_dict(state)
    assert_equal(actual, [x / 2 for x in gradients_of(yolo11, yolo11.forward, 9)])


@pytest.mark.parametrize("options", [{"warmup": 0}, {"min_rows": 0}, {"max_graphs": 0}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, got 0"):
        GraphedStep(lambda images, targets: None, nn.Linear(1, 1), **options)


def test_arguments_of_another_kind():
    with pytest.raises(ValueError, match="modules must have the model and the criterion, got none"):
        GraphedStep(lambda images, targets: None)
    with pytest.raises(TypeError, match="modules must be modules, got function"):
        GraphedStep(lambda images, targets: None, lambda: None)


class BrokenCapture(contextlib.AbstractContextManager):
    """PyTorch's capture of a step that broke it: ending it raises, too, and its stream stays the current one."""

    def __init__(self, graph: Any, **options: Any) -> None:
        self.options = options

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_broken_capture_names_the_first_reason_and_is_ended(monkeypatch):
    done = []
    generator = SimpleNamespace(clone_state=lambda: "clone", graphsafe_set_state=done.append)
    fakes = {
        "CUDAGraph": object, "graph": BrokenCapture, "graph_pool_handle": lambda: (0, 7),
        "device": lambda device: contextlib.nullcontext(), "current_stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(), "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": done.append, "default_generators": [generator],
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_recording, "_stream_of", lambda device: None)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: done.append((name, *args)), raising=False)

    def work() -> list[Tensor]:
        raise BrokenError("not allowed while capturing")

    with pytest.raises(BrokenError, match="not allowed while capturing"):
        _recording.Recorder(torch.device("cuda", 0)).record(work)
    pool = 0, (0, 7)
    assert done == ["error", 0, "clone", ("_cuda_endAllocateToPool", *pool), ("_cuda_releasePool", *pool)]
