"""Ultralytics' models and trainers with `patch()`: the same losses, gradients and steps, and no trace in what they save."""

import contextlib
import copy
import functools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import triton_yolo as ty
from bench import peers
from tests import adapters, compare
from tests.recorder import Recorder, recorded
from triton_yolo.graphs import GraphedStep
from triton_yolo.integrations import _ultralytics_detect, _ultralytics_graphs
from triton_yolo.integrations import ultralytics as integration
from triton_yolo.integrations._patching import kept

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent
EPOCHS = 2
BRANCHED = ("yolov10n", "yolo26n")
DETECTORS = ("yolov8n", "yolov9t", "yolo11n", "yolo12n", *BRANCHED)
assert_close = functools.partial(compare.assert_close, tolerance=compare.OF_A_STEP)


@pytest.fixture(autouse=True, scope="module")
def contained():
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with peers.contained():
        import ultralytics  # noqa: F401  sets up its log

        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def stays():
    """What keeps Ultralytics' own computation."""
    with adapters.what_stays("ultralytics") as lines:
        yield lines
        integration.unpatch()


@functools.cache
def built(name: str, num_classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return peers.ultralytics_model(f"{name}.yaml", num_classes)


def make_model(name: str, num_classes: int = 3) -> torch.nn.Module:
    return copy.deepcopy(built(name, num_classes))


def make_batch(empty: str = "") -> dict[str, torch.Tensor]:
    """Three images, 96 by 128 px, with two boxes, one and three, some of them tiny; "one" image or "all" without."""
    generator = torch.Generator().manual_seed(1)
    image = torch.tensor([0.0, 0, 1, 2, 2, 2])
    size = 0.1 + 0.4 * torch.rand(6, 2, generator=generator)
    size[3], size[4] = 0.04, 0.1
    boxes = torch.cat([size / 2 + (1 - size) * torch.rand(6, 2, generator=generator), size], 1)
    kept = image != 1 if empty == "one" else image < (0 if empty == "all" else 3)
    labels = torch.arange(6.0).remainder(3)[:, None]
    images = torch.rand(3, 3, 96, 128, generator=generator)
    return {"batch_idx": image[kept], "cls": labels[kept], "bboxes": boxes[kept], "img": images}


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, items and the gradient of all parameters."""
    model.zero_grad()
    loss, items = model.loss(batch)
    loss.sum().backward()
    return loss.detach(), items, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_steps(model: torch.nn.Module, batch: dict[str, torch.Tensor], *, is_ours: bool = True) -> None:
    """One step stock and one patched, with the same criterion object."""
    stock = step(model, batch)
    with integration.patched():
        ours = step(model, batch)
    assert ours[0].shape == ((1,) if is_ours else stock[0].shape)
    assert_close(ours[0].sum(), stock[0].sum(), "loss")
    assert list(ours[1]) == list(stock[1])
    for name, item in stock[1].items():
        assert ours[1][name].shape == ()
        assert not ours[1][name].requires_grad
        assert_close(ours[1][name], item, name)
    assert (ours[2] - stock[2]).abs().max() <= 1e-4 * stock[2].abs().max()


@pytest.mark.parametrize("name", DETECTORS)
def test_step(name):
    compare_steps(make_model(name), make_batch())


@pytest.mark.parametrize("empty", ["one", "all"])
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_empty_images(name, empty):
    compare_steps(make_model(name), make_batch(empty))


@pytest.mark.parametrize("gains", [{"box": 2.0}, {"cls": 3.0}, {"dfl": 0.25}])
def test_gains_may_change_at_any_time(gains):
    model = make_model("yolo11n")
    compare_steps(model, make_batch())
    vars(model.args).update(gains)
    compare_steps(model, make_batch())


def test_class_weights():
    model = make_model("yolo11n")
    before = step(model, make_batch())[1]["cls_loss"]
    model.criterion.class_weights = torch.tensor([[[0.25, 1.0, 4.0]]])
    compare_steps(model, make_batch())
    assert step(model, make_batch())[1]["cls_loss"] != before


def test_strides_are_those_of_the_criterion():
    """It decodes boxes with its own; the assigner has them as it was made."""
    model = task_model("yolo11n-seg")
    model.criterion = model.init_criterion()
    model.criterion.stride = model.criterion.stride * 2
    compare_steps(model, task_batch("yolo11n-seg"))


@pytest.mark.parametrize("class_weights", [None, torch.tensor([[[0.25, 1.0, 4.0]]])])
def test_steps_share_a_criterion(class_weights, calls):
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    model.criterion.class_weights = class_weights
    for gain in (7.5, 7.5, 2.0):
        vars(model.args).update(box=gain)
        compare_steps(model, make_batch())
    assert calls[0] is calls[1] is not calls[2]


def test_float64():
    """Ultralytics makes its targets in the default type."""
    model, batch = make_model("yolo26n").double(), {name: value.double() for name, value in make_batch().items()}
    torch.set_default_dtype(torch.float64)
    try:
        stock = step(model, batch)
        with integration.patched():
            ours = step(model, batch)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip((ours[0], *ours[1].values(), ours[2]), (stock[0].sum(), *stock[1].values(), stock[2]), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("name", BRANCHED)
def test_branches_keep_their_decaying_weights(name):
    model, weights = make_model(name), []
    vars(model.args).update(epochs=4)
    for _ in range(3):
        compare_steps(model, make_batch())
        weights.append(model.criterion.o2m)
        model.criterion.update()
    assert weights[0] > weights[1] > weights[2]


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_autocast(name):
    """The criterion sees bfloat16; Ultralytics' on the same numbers in float32 is the standard."""
    model, batch = make_model(name), make_batch()

    def in_float32(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: in_float32(v) for k, v in value.items()}
        return [x.float() for x in value] if isinstance(value, list) else value.float()

    with torch.autocast("cpu", torch.bfloat16):
        preds = model(batch["img"])
        with integration.patched():
            loss, items = model.loss(batch, preds)
    expected, expected_items = model.loss(batch, in_float32(preds))
    assert loss.dtype == torch.float32
    assert_close(loss.sum(), expected.sum(), "loss")
    for key, item in expected_items.items():
        assert_close(items[key], item, key)


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_validator_has_its_own_criterion_in_inference_mode(name):
    model, batch = make_model(name).eval(), make_batch()
    results = []
    for context in (contextlib.nullcontext, integration.patched):
        average = copy.deepcopy(model)
        with context(), torch.inference_mode():
            results.append(average.loss(batch, average(batch["img"])))
    (expected, expected_items), (loss, items) = results
    assert_close(loss.sum(), expected.sum(), "loss")
    assert list(items) == list(expected_items)
    assert loss.shape == (1,)


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_models_hold_nothing_of_ours(name):
    model = make_model(name)
    keys = list(model.state_dict())
    children = [module_name for module_name, _ in model.named_modules()]
    with integration.patched():
        step(model, make_batch())
        assert list(model.state_dict()) == keys
        assert [module_name for module_name, _ in model.named_modules()] == children
        assert b"triton_yolo" not in pickle.dumps(model)
        twin = copy.deepcopy(model)
        assert_close(step(twin, make_batch())[0], step(model, make_batch())[0])


def task_model(task: str) -> torch.nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    torch.manual_seed(0)
    kind = {"seg": tasks.SegmentationModel, "pose": tasks.PoseModel, "obb": tasks.OBBModel}[task.split("-")[1]]
    model = kind(f"{task}.yaml", ch=3, nc=1, verbose=False)
    model.args = get_cfg()
    return model.train()


def task_batch(task: str) -> dict[str, torch.Tensor]:
    batch = make_batch()
    batch["cls"] = batch["cls"] * 0
    centre, size = batch["bboxes"].split(2, 1)
    if "obb" in task:
        batch["bboxes"] = torch.cat([batch["bboxes"], torch.full((6, 1), 0.3)], 1)
    batch["keypoints"] = torch.cat([(centre + size * 0.2)[:, None].expand(-1, 17, -1), torch.ones(6, 17, 1)], 2)
    batch["masks"] = torch.zeros(3, 24, 32)
    batch["sem_masks"] = torch.zeros(3, 24, 32, dtype=torch.long)
    slot = [0, 1, 0, 0, 1, 2]
    for image, index, (x, y), (w, h) in zip(batch["batch_idx"].long(), slot, centre, size, strict=True):
        rows = slice(int((y - h / 2) * 24), int((y + h / 2) * 24))
        batch["masks"][image, rows, int((x - w / 2) * 32) : int((x + w / 2) * 32)] = index + 1
    return batch


def test_a_criterion_that_stays_has_our_assigner(monkeypatch, stays):
    calls = []
    ours = _ultralytics_detect.TaskAlignedAssigner
    monkeypatch.setattr(_ultralytics_detect, "TaskAlignedAssigner", lambda *args: calls.append(args) or ours(*args))
    model = task_model("yolo11n-seg")
    model.criterion = model.init_criterion()
    model.criterion.bce = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full((1,), 2.0))
    compare_steps(model, task_batch("yolo11n-seg"), is_ours=False)
    assert len(calls) == 1
    assert "keeps the computation of ultralytics: bce has other settings" in stays.pop()


@pytest.mark.parametrize("task", ["yolo26n-seg", "yolo26n-pose"])
def test_other_assigners_stay_and_say_so_once(task, monkeypatch, stays):
    monkeypatch.setattr(_ultralytics_detect, "TaskAlignedAssigner", None)
    model = task_model(task)
    torch.manual_seed(0)  # YOLO26's pose has a random flow
    compare_steps(model, task_batch(task), is_ours=False)
    compare_steps(model, task_batch(task), is_ours=False)
    assert f"triton_yolo {ty.__version__}: computes the losses of Ultralytics' detectors from now on" in stays
    kept = [line for line in stays if "keeps the computation of ultralytics: its class is another" in line]
    assert len(kept) == len(set(kept)) >= 1
    stays.clear()


def test_visual_prompts_keep_single_terms(stays):
    from ultralytics.utils.loss import TVPDetectLoss

    with integration.patched():
        criterion = TVPDetectLoss(make_model("yolo11n")).vp_criterion
        preds, batch = make_model("yolo11n")(make_batch()["img"]), make_batch()
        assert criterion(preds, batch)[0].shape == (3,)
    assert "v8DetectionLoss keeps the computation of ultralytics: it is part of a TVPDetectLoss" in stays.pop()


def methods() -> list[Callable]:
    from ultralytics.utils import dist, loss, tal

    criteria = (loss.v8DetectionLoss, loss.v8OBBLoss, loss.v8SegmentationLoss, loss.v8PoseLoss)
    others = [tal.TaskAlignedAssigner.forward, dist.generate_ddp_file, loss.TVPDetectLoss.__init__]
    return [*[criterion.loss for criterion in criteria], *others]


def test_patch_and_unpatch():
    stock = methods()
    integration.unpatch()
    integration.patch()
    ours = methods()
    assert all(a is not b for a, b in zip(stock, ours, strict=True))
    integration.patch()
    with integration.patched():
        pass
    assert methods() == ours
    integration.unpatch()
    assert methods() == stock
    with pytest.raises(ZeroDivisionError), integration.patched():
        raise ZeroDivisionError
    assert methods() == stock


def test_unpatch_does_not_undo_what_others_did(monkeypatch):
    from ultralytics.utils.loss import v8DetectionLoss

    with monkeypatch.context() as context:
        integration.patch()
        context.setattr(v8DetectionLoss, "loss", lambda *_: None)
        with pytest.raises(RuntimeError, match=r"v8DetectionLoss\.loss was replaced"):
            integration.unpatch()


def test_untested_version_warns_and_is_compared(monkeypatch):
    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.5.2")
    with pytest.warns(UserWarning, match=r"8\.5\.2 is untested, tested is 8\.4\.190"):
        integration.patch()
    assert len(integration._PATCH._saved) == len(methods())


def test_untested_version_is_compared_in_float32_with_gradients(monkeypatch):
    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.5.2")
    with pytest.warns(UserWarning, match="untested"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        integration.patch()


def test_another_loss_stays_as_it_is(monkeypatch):
    from ultralytics.utils.loss import v8DetectionLoss, v8PoseLoss

    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.5.2")
    ours = _ultralytics_detect.YOLO11Loss
    wrong = integration.DETECTION._replace(make=lambda box_gain, **settings: ours(box_gain=1.01 * box_gain, **settings))
    monkeypatch.setitem(integration._CRITERIA, "v8DetectionLoss", wrong)
    kept.cache_clear()
    stock = v8DetectionLoss.loss, v8PoseLoss.loss
    keeps = r"v8DetectionLoss keeps its stock computation: .* its loss is another"
    with pytest.warns(UserWarning, match="untested"), pytest.warns(UserWarning, match=keeps):
        integration.patch()
    assert (v8DetectionLoss.loss is stock[0], v8PoseLoss.loss is stock[1]) == (True, False)
    criterion = make_model("yolo11n").init_criterion()
    assert _ultralytics_detect.constants(criterion, torch.device("cpu")) is None  # no graph holds a loss that may synchronise
    kept.cache_clear()  # of the criterion with another gain


def test_other_losses_only_are_an_error(monkeypatch):
    def differ(owner, loss):
        raise RuntimeError(f"{owner.__name__} differs")

    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.5.2")
    monkeypatch.setattr(integration, "compare_losses", differ)
    before = methods()
    with pytest.warns(UserWarning, match="untested|keeps its stock"), pytest.raises(RuntimeError, match="v8PoseLoss differs"):
        integration.patch()
    assert methods() == before


def test_items_of_another_form_stay(monkeypatch):
    from ultralytics.utils.loss import v8DetectionLoss

    stock = v8DetectionLoss.loss

    def loss(self, preds, batch):
        total, items = stock(self, preds, batch)
        return total, torch.stack([*items.values()])

    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.4.60")
    monkeypatch.setattr(_ultralytics_detect.Stock, "difference", lambda self, x: None)  # another stock loss, not a user's
    monkeypatch.setattr(v8DetectionLoss, "loss", loss)
    keeps = pytest.warns(UserWarning, match="v8DetectionLoss keeps .* items are")
    with pytest.warns(UserWarning, match="untested"), keeps:
        integration.patch()
    assert v8DetectionLoss.loss is loss


def test_items_of_criteria_without_names():
    """As before 8.4.104."""
    model, batch = make_model("yolo11n"), make_batch()
    criterion, preds = model.init_criterion(), model(batch["img"])
    integration.patch()
    total, items = criterion(preds, batch)
    del criterion.loss_names
    assert torch.equal(criterion(preds, batch)[0], total)
    assert torch.equal(criterion(preds, batch)[1], torch.stack([*items.values()]))


@pytest.mark.parametrize(("owner", "name"), [("v8DetectionLoss", "loss"), ("TaskAlignedAssigner", "forward")])
def test_changed_methods_are_an_error(owner, name, monkeypatch):
    from ultralytics.utils import loss, tal

    cls = getattr(loss if owner == "v8DetectionLoss" else tal, owner)
    monkeypatch.setattr(cls, name, lambda self, other: None)
    with pytest.raises(RuntimeError, match=rf"{owner}\.{name} takes \('self', 'other'\), expected"):
        integration.patch()
    monkeypatch.delattr(cls, name)
    with pytest.raises(RuntimeError, match=rf"{owner}\.{name} takes None"):
        integration.patch()


@pytest.mark.parametrize("attribute", ["nc", "reg_max", "assigner", "hyp", "class_weights"])
def test_changed_criterion_is_an_error(attribute):
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    delattr(model.criterion, attribute)
    integration.patch()
    with pytest.raises(RuntimeError, match=f"settings or inputs have changed: .*{attribute}"):
        model.loss(make_batch())


@pytest.mark.parametrize("key", ["boxes", "scores", "feats"])
def test_changed_predictions_are_an_error(key):
    model = make_model("yolo11n")
    preds = model(make_batch()["img"])
    preds[f"new_{key}"] = preds.pop(key)
    integration.patch()
    with pytest.raises(RuntimeError, match=f"settings or inputs have changed: '{key}'"):
        model.loss(make_batch(), preds)


class Probe:
    """Stands in for a trainer in the process of a rank."""

    def __init__(self, cfg: Any = None, overrides: Any = None, _callbacks: Any = None) -> None:
        """Ignore what a trainer takes."""

    def train(self) -> None:
        print("patched" if integration._PATCH.is_applied else "stock")


@pytest.mark.parametrize("context", [integration.patched, contextlib.nullcontext])
def test_processes_of_ddp_are_patched_too(context, tmp_path):
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import dist

    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom bench import peers\nkept = peers.contained()\nkept.__enter__()\n"
    )
    probe = Probe()
    probe.args, probe.model, probe.callbacks, probe.resume = get_cfg(), "yolo11n.yaml", {}, False
    probe.hub_session = None
    with context():
        script = dist.generate_ddp_file(probe)
    try:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    finally:
        dist.ddp_cleanup(probe, script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == ("patched" if context is integration.patched else "stock")


def test_trainer_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(integration.DetectionTrainer)) is integration.DetectionTrainer
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = integration.Trainer


class Training(NamedTuple):
    """What a short training left: losses of every step, weight of the one-to-many branch at each, folder and trainer."""

    steps: list[dict[str, float]]
    branch_weights: list[float | None]
    folder: Path
    trainer: Any


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eight noisy pictures with a bright box in each; one has none."""
    import cv2

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for index in range(8):
        pixels = rng.integers(0, 90, (64, 64, 3), np.uint8)
        left, top, width, height = rng.integers(4, 28, 4)
        pixels[top : top + height, left : left + width] += 120
        cv2.imwrite(str(folder / f"images/{index}.png"), pixels)
        row = f"{index % 3} {(left + width / 2) / 64} {(top + height / 2) / 64} {width / 64} {height / 64}\n"
        (folder / f"labels/{index}.txt").write_text(row if index else "")
    config = folder / "data.yaml"
    config.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [a, b, c]\n")
    return config


class SwitchedOffError(Exception):
    """Somebody switches the machine off."""


def train(
    config: Path,
    folder: Path,
    weights: str,
    *,
    interrupted: bool = False,
    trainer: type | None = None,
    batch: int = 4,
    **options,
):
    from ultralytics import YOLO

    steps, branch_weights = [], []

    def record(trainer: Any) -> None:
        steps.append({**{name: float(value) for name, value in trainer.loss_items.items()}, "sum": trainer.loss.item()})
        branch_weights.append(getattr(trainer.model.criterion, "o2m", None))

    def interrupt(trainer: Any) -> None:
        shutil.copy(trainer.last, folder / "whole.pt")
        if interrupted:
            raise SwitchedOffError

    model = YOLO(weights)
    model.add_callback("on_train_batch_end", record)
    model.add_callback("on_model_save", interrupt)
    with contextlib.suppress(SwitchedOffError):
        model.train(
            trainer=trainer, data=str(config), epochs=EPOCHS, imgsz=64, batch=batch, workers=0, device="cpu", pretrained=False,
            plots=False, amp=False, project=str(folder), name="run", exist_ok=True, seed=0, verbose=False,
            **options,
        )  # fmt: skip
    return Training(steps, branch_weights, folder, model.trainer)


def compare_trainings(ours: Training, stock: Training) -> None:
    assert len(ours.steps) == len(stock.steps) > 0
    assert ours.branch_weights == stock.branch_weights
    for a, b in zip(ours.steps, stock.steps, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=compare.OF_A_STEP, abs=1e-6), name


@pytest.fixture
def calls(monkeypatch) -> list:
    """A growing list of what was called, our criterion at every step."""
    calls, forward = [], _ultralytics_detect.YOLO11Loss.forward
    monkeypatch.setattr(
        _ultralytics_detect.YOLO11Loss, "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    return calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ultralytics imports
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_training(name, pictures, tmp_path, calls):
    options, unpatched_methods = {"cls_pw": 0.5} if name == "yolo11n" else {}, methods()
    stock = train(pictures, tmp_path / "stock", f"{name}.yaml", **options)
    assert not calls
    ours = train(pictures, tmp_path / "ours", f"{name}.yaml", trainer=integration.DetectionTrainer, **options)
    assert methods() == unpatched_methods
    branches = 2 if name == "yolo26n" else 1
    # Every epoch has two steps and one batch of validation.
    assert len(calls) == branches * EPOCHS * (2 + 1)
    assert all((call.class_weights is not None) == bool(options) for call in calls)
    compare_trainings(ours, stock)
    for file in (ours.folder / "whole.pt", ours.trainer.last):
        assert_loads_without_us(file)


def assert_loads_without_us(file: Path) -> None:
    code = f"""
import sys
sys.modules["triton_yolo"] = None
from bench import peers
with peers.contained():
    import torch
    content = torch.load({str(file)!r}, weights_only=False)
    model = (content["ema"] or content["model"]).float().eval()
    assert model(torch.zeros(1, 3, 64, 64))[0].isfinite().all()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_resumed_training(pictures, tmp_path, calls):
    results = []
    for context in (contextlib.nullcontext, integration.patched):
        folder = tmp_path / context.__name__
        with context():
            begun = train(pictures, folder, "yolo26n.yaml", interrupted=True)
            results.append(train(pictures, folder, str(begun.trainer.last), resume=True))
    stock, ours = results
    assert len(ours.steps) == (EPOCHS - 1) * 2
    compare_trainings(ours, stock)
    assert len(calls) == 2 * EPOCHS * (2 + 1)


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[GraphedStep]]:
    """The graphed steps that trainers make, recorded after one step of a shape."""
    made, make = [], functools.partial(GraphedStep, warmup=1)
    monkeypatch.setattr(
        _ultralytics_graphs, "GraphedStep", lambda *args, **options: made.append(make(*args, **options)) or made[-1]
    )
    with recorded() as recorder:
        from ultralytics.engine.trainer import BaseTrainer

        start = BaseTrainer.run_callbacks
        monkeypatch.setattr(recorder, "modules", ())

        def run_callbacks(trainer: Any, event: str) -> None:
            if event == "on_train_start":
                recorder.modules = (trainer.model,)
            start(trainer, event)

        monkeypatch.setattr(BaseTrainer, "run_callbacks", run_callbacks)
        yield made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_with_graphs(pictures, tmp_path, graphs, calls):
    """Epochs of batches of 3, 3 and 2; the stock step makes the criterion, the first of a shape runs as it is, so do others."""
    ours = train(pictures, tmp_path / "ours", "yolo11n.yaml", batch=3, trainer=integration.DetectionTrainer)
    num_calls = len(calls)
    with integration.patched(cuda_graph=True):
        graphed = train(pictures, tmp_path / "graphed", "yolo11n.yaml", batch=3)
    (step,) = graphs
    assert step.num_replays == 1
    assert Recorder.num_graphs == 2
    assert len(calls) == 2 * num_calls + 1
    assert graphed.steps == ours.steps
    a, b = (run.trainer.ema.ema.state_dict() for run in (graphed, ours))
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert not step._recordings
    assert_loads_without_us(graphed.folder / "whole.pt")


def test_only_batches_of_a_training_are_replayed(graphs):
    model = make_model("yolo11n")
    with integration.patched(cuda_graph=True):
        for _ in range(2):
            step(model, make_batch())
    assert not graphs


@pytest.fixture
def as_training(monkeypatch, graphs) -> Callable[..., None]:
    """Do something with a model while a trainer trains, with graphs."""
    from ultralytics.engine.trainer import BaseTrainer

    monkeypatch.setattr(BaseTrainer, "train", lambda self: self.work())

    def run(model: torch.nn.Module, work: Callable[[], None]) -> None:
        monkeypatch.setattr(Recorder, "modules", (model,))
        with integration.patched(cuda_graph=True):
            BaseTrainer.train(SimpleNamespace(work=work, args=model.args))

    return run


CHANGES = {
    "class weights": ("yolo11n", lambda x: setattr(x.criterion, "class_weights", torch.tensor([[[0.25, 1.0, 4.0]]]))),
    "a gain": ("yolo11n", lambda x: vars(x.args).update(box=2.0)),
    "weights of branches": ("yolo26n", lambda x: x.criterion.update()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_count_with_graphs_too(change, graphs, as_training):
    name, apply = CHANGES[change]
    model, losses = make_model(name), []
    vars(model.args).update(epochs=4)
    model.criterion = model.init_criterion()

    def work() -> None:
        for number in (3, 2):  # the first of all runs as it is, and so does the first of a shape
            for _ in range(number):
                losses.append(step(model, make_batch()))
            assert len(graphs[0]._recordings) == 1
            apply(model)

    as_training(model, work)
    assert graphs[0].num_replays == 2
    expected = make_model(name)
    vars(expected.args).update(epochs=4)
    expected.criterion = expected.init_criterion()
    with integration.patched():
        for index, (loss, _, gradient) in enumerate(losses):
            loss_, _, gradient_ = step(expected, make_batch())
            assert torch.equal(loss, loss_)
            assert torch.equal(gradient, gradient_)
            if index == 2:
                apply(expected)


def test_multi_scale_trains_without_graphs(graphs, as_training, stays):
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    vars(model.args).update(multi_scale=0.5)
    as_training(model, lambda: [step(model, make_batch()) for _ in range(2)])
    assert not graphs
    assert any("multi_scale trains without CUDA graphs" in line for line in stays)


def test_a_stock_computation_has_no_graphs(graphs, as_training, stays):
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    model.criterion.bce = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(2.0))
    as_training(model, lambda: [step(model, make_batch()) for _ in range(2)])
    assert not graphs
    assert "keeps the computation of ultralytics: bce has other settings" in stays.pop()


def test_a_changed_criterion_is_an_error_with_graphs_too(as_training):
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    del model.criterion.nc
    with pytest.raises(RuntimeError, match=r"settings or inputs have changed: .*nc"):
        as_training(model, lambda: step(model, make_batch()))


def test_several_processes_train_without_graphs(graphs, as_training, monkeypatch):
    monkeypatch.setattr(_ultralytics_graphs.dist, "is_initialized", lambda: True)
    model = make_model("yolo11n")
    model.criterion = model.init_criterion()
    as_training(model, lambda: [step(model, make_batch()) for _ in range(2)])
    assert not graphs


def test_patch_with_graphs_is_undone():
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.nn.tasks import BaseModel

    stock = [*methods(), BaseModel.loss, BaseTrainer.train]
    integration.patch()
    integration.patch(cuda_graph=True)
    integration.patch(cuda_graph=True)
    ours = [*methods(), BaseModel.loss, BaseTrainer.train]
    assert all(a is not b for a, b in zip(stock, ours, strict=True))
    integration.unpatch()
    assert [*methods(), BaseModel.loss, BaseTrainer.train] == stock


@pytest.mark.parametrize("name", ["loss", "train"])
def test_changed_methods_of_steps_are_an_error(name, monkeypatch):
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.nn.tasks import BaseModel

    monkeypatch.setattr(BaseModel if name == "loss" else BaseTrainer, name, lambda other: None)
    stock, expected = methods(), rf"{name} takes \('other',\), expected"
    with pytest.raises(RuntimeError, match=expected), integration.patched(cuda_graph=True):
        pass
    with pytest.raises(RuntimeError, match=expected):
        integration.patch(cuda_graph=True)
    assert methods() == stock
    integration.patch()
    ours = methods()
    with pytest.raises(RuntimeError, match=expected):
        integration.patch(cuda_graph=True)
    assert methods() == ours, "what was patched before stays"
