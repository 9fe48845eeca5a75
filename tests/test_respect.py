"""What a user changed in a trainer's criterion keeps the stock computation, in every one of the trainers."""

import functools
import sys
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import peers
from tests import adapters
from tests.compare import assert_close
from triton_yolo.integrations import libreyolo, ultralytics, yolox
from triton_yolo.integrations._stock import BCE, Stock, is_elementwise, say_what_stays

SHAPES, STRIDES = [(8, 8), (4, 4), (2, 2)], (8, 16, 32)


class Trainer:
    """One of the trainers on random predictions: a fresh criterion, and its loss and gradient."""

    def __init__(self, integration: Any, package: str, make: Callable[[], Any], loss: Callable[..., Tensor], channels: int):
        self.integration, self.package, self.make, self.loss = integration, package, make, loss
        self.preds = torch.randn(2, channels, 84, generator=torch.Generator().manual_seed(0))
        self.rows = torch.tensor([[0, 0, 0.5, 0.5, 0.6, 0.5], [0, 1, 0.3, 0.4, 0.3, 0.4], [1, 2, 0.6, 0.6, 0.5, 0.7]])

    def step(self, criterion: Any) -> tuple[Tensor, Tensor]:
        preds = self.preds.clone().requires_grad_()
        loss = self.loss(criterion, preds, self.rows).sum()
        return loss.detach(), torch.autograd.grad(loss, preds)[0]


def ultralytics_loss(criterion: Any, preds: Tensor, rows: Tensor) -> Tensor:
    return criterion(peers.ultralytics_preds(*preds.split([64, 3], 1), SHAPES), peers.ultralytics_batch(rows))[0]


def ultralytics_pose_loss(criterion: Any, preds: Tensor, rows: Tensor) -> Tensor:
    dist, scores, keypoints = preds.split([64, 3, 15], 1)
    batch = {**peers.ultralytics_batch(rows), "keypoints": rows[:, None, 1:4].repeat(1, 5, 1) / 3}
    return criterion(peers.ultralytics_preds(dist, scores, SHAPES, kpts=keypoints), batch)[0]


def ultralytics_oriented_loss(criterion: Any, preds: Tensor, rows: Tensor) -> Tensor:
    dist, angle, scores = preds.split([64, 1, 3], 1)
    rows = torch.cat([rows, torch.tensor([[0.3], [1.0], [-0.5]])], 1)
    return criterion(peers.ultralytics_preds(dist, scores, SHAPES, angle=angle), peers.ultralytics_batch(rows))[0]


def yolo9_loss(criterion: Any, preds: Tensor, rows: Tensor) -> Tensor:
    targets = peers.libreyolo_targets(rows, 2)
    return criterion(peers.libreyolo_maps(*preds.split([64, 3], 1), SHAPES), targets)["total_loss"]


def yolox_loss(head: Any, preds: Tensor, rows: Tensor) -> Tensor:
    levels = [x.unflatten(2, shape) for x, shape in zip(preds.split([h * w for h, w in SHAPES], 2), SHAPES, strict=True)]
    raw = [x[:, :4].flatten(2).transpose(1, 2).clone() for x in levels]
    levels = [level.clone() for level in levels]  # decoded in place
    decoded = [head.get_output_and_grid(x, k, STRIDES[k], x.type()) for k, x in enumerate(levels)]
    x_shifts, y_shifts = ([grid[..., axis] for _, grid in decoded] for axis in (0, 1))
    strides = [torch.full((1, h * w), float(stride)) for (h, w), stride in zip(SHAPES, STRIDES, strict=True)]
    labels = peers.yolox_labels(rows, 2, (64, 64))
    outputs = torch.cat([output for output, _ in decoded], 1)
    losses = head.get_losses(None, x_shifts, y_shifts, strides, labels, outputs, raw, preds.dtype)
    return losses["total_loss"] if isinstance(losses, dict) else losses[0]


def yolox_head() -> nn.Module:
    return peers.yolox_head(3, STRIDES, use_l1=True)


def libreyolo_head() -> nn.Module:
    head = peers.libreyolo_yolox_head(3, STRIDES)
    head.use_l1 = True
    return head


@functools.cache
def ultralytics_model(config: str = "yolo11n.yaml") -> Any:
    return peers.ultralytics_model(config, 3)


@functools.cache
def ultralytics_pose_model() -> Any:
    return peers.ultralytics_pose_model("yolo11n-pose.yaml", 3, 5)


TRAINERS = {
    "ultralytics": lambda: Trainer(
        ultralytics, "ultralytics", lambda: ultralytics_model().init_criterion(), ultralytics_loss, 67
    ),
    "ultralytics-pose": lambda: Trainer(
        ultralytics, "ultralytics", lambda: ultralytics_pose_model().init_criterion(), ultralytics_pose_loss, 82
    ),
    "ultralytics-obb": lambda: Trainer(
        ultralytics,
        "ultralytics",
        lambda: ultralytics_model("yolo11n-obb.yaml").init_criterion(),
        ultralytics_oriented_loss,
        68,
    ),
    "yolox": lambda: Trainer(yolox, "yolox", yolox_head, yolox_loss, 8),
    "libreyolo-yolox": lambda: Trainer(libreyolo, "libreyolo", libreyolo_head, yolox_loss, 8),
    "libreyolo-yolo9": lambda: Trainer(
        libreyolo,
        "libreyolo",
        lambda: peers.libreyolo_yolo9_criterion(3, 16, STRIDES, 64, torch.device("cpu")),
        yolo9_loss,
        67,
    ),
}


@pytest.fixture
def trainer(request):
    made = TRAINERS[request.param]()
    if not peers.is_installed(made.package):
        pytest.skip(f"{made.package} is not installed; `make peers` installs it")
    with peers.contained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield made
        made.integration.unpatch()


class FocalLoss(nn.Module):
    """A focal loss in the place of the criterion's BCE, as public threads advise it."""

    def forward(self, logits, targets):
        bce = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return bce * (1 - torch.exp(-bce)) ** 4


def scaled(stock: Callable, factor: float = 1.1) -> Callable:
    """A function whose numbers are those of another times a factor; it keeps the other's name and module."""

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        return tuple(factor * x for x in result) if isinstance(result, tuple) else factor * result

    return call


def altered(alter: Callable[[Any], Any]) -> Callable:
    """What makes such a function of another, whose result it alters."""

    def make(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            return alter(stock(*args, **kwargs))

        return call

    return make


moved = altered(lambda targets: torch.cat([targets[..., :1], targets[..., 1:] * 0.9], -1))
halved = altered(lambda overlaps: overlaps / 2)
one_metric = altered(lambda metric_and_overlaps: (metric_and_overlaps[0].bool().float(), metric_and_overlaps[1]))
half_scores = altered(lambda result: (*result[:2], result[2] / 2, *result[3:]))
half_matches = altered(lambda result: (result[0] / 2, *result[1:]))


class Scaled:
    """The same as an object, which is no function."""

    def __init__(self, stock: Callable) -> None:
        functools.update_wrapper(self, stock)
        self.stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.stock)(*args, **kwargs)


# A change takes the criterion and monkeypatch; every one of them changes the loss.


def member(path: str, make: Callable[[Any], Any]) -> Callable:
    """Put something else in the place of a member."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, criterion)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def setting(path: str, value: Any) -> Callable:
    return member(path, lambda _: value)


def subclass(path: str) -> Callable:
    """Let a member be of a subclass."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        x = functools.reduce(getattr, path.split("."), criterion)
        name = "__call__" if "__call__" in vars(type(x)) else "forward"
        x.__class__ = type("Other", (type(x),), {name: scaled(getattr(type(x), name))})

    return change


def method(path: str, name: str, make: Callable = scaled) -> Callable:
    """Replace a method in the class of a member, or of the criterion itself."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        owner = type(functools.reduce(getattr, [part for part in path.split(".") if part], criterion))
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    return change


def own_method(path: str, name: str, make: Callable = scaled) -> Callable:
    """Replace a method in an object."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        x = functools.reduce(getattr, [part for part in path.split(".") if part], criterion)
        setattr(x, name, make(getattr(x, name)))

    return change


def function(module: str, name: str, make: Callable = scaled) -> Callable:
    """Replace a function of a module."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        owner = sys.modules[module]
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    return change


def inherited(name: str) -> Callable:
    """Replace a method in the class that the criterion's has it from."""

    def change(criterion: Any, monkeypatch: Any) -> None:
        owner = next(base for base in type(criterion).__mro__ if name in vars(base))
        monkeypatch.setattr(owner, name, scaled(getattr(owner, name)))

    return change


def static(stock: Callable) -> Any:
    return staticmethod(scaled(stock))


def hook(path: str, kind: str = "forward") -> Callable:
    def change(criterion: Any, monkeypatch: Any) -> None:
        x = functools.reduce(getattr, path.split("."), criterion)
        if kind == "forward":
            x.register_forward_hook(lambda module, inputs, output: scaled(lambda: output)())
        else:
            x.register_forward_pre_hook(lambda module, inputs: (1.1 * inputs[0], *inputs[1:]))

    return change


def weighted(_: Any) -> nn.Module:
    return nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full((1,), 3.0))


def softened_iou(stock: Callable) -> Callable:
    return functools.partial(stock, eps=1.0)


def focal(_: Any) -> nn.Module:
    return FocalLoss()


YOLOX = [
    ("bcewithlog_loss", member("bcewithlog_loss", focal)),
    ("bcewithlog_loss", member("bcewithlog_loss", weighted)),
    ("l1_loss", member("l1_loss", lambda _: nn.SmoothL1Loss(reduction="none"))),
    ("iou_loss", subclass("iou_loss")),
    ("iou_loss", hook("iou_loss")),
    ("l1_loss", hook("l1_loss", "forward_pre")),
    ("iou_loss.forward", own_method("iou_loss", "forward")),
    ("forward", method("iou_loss", "forward")),
    ("get_l1_target", own_method("", "get_l1_target")),
    ("get_l1_target", method("", "get_l1_target")),
]
YOLO9 = "libreyolo.models.yolo9.loss"
LOSS, TAL = "ultralytics.utils.loss", "ultralytics.utils.tal"
CHANGES = {
    "ultralytics": [
        ("bce is a FocalLoss", member("bce", focal)),
        ("bce has other settings", member("bce", weighted)),
        ("bce has hooks", hook("bce")),
        ("bce has hooks", hook("bce", "forward_pre")),
        ("bce.forward", own_method("bce", "forward")),
        ("bbox_loss is a Other", subclass("bbox_loss")),
        ("bbox_loss.forward", own_method("bbox_loss", "forward")),
        ("BboxLoss.forward", method("bbox_loss", "forward")),
        ("bbox_loss.dfl_loss is a Other", subclass("bbox_loss.dfl_loss")),
        ("DFLoss.__call__", method("bbox_loss.dfl_loss", "__call__")),
        ("its bbox_decode", own_method("", "bbox_decode")),
        ("v8DetectionLoss.bbox_decode", method("", "bbox_decode")),
        ("v8DetectionLoss.preprocess", method("", "preprocess", moved)),
        ("assigner.get_box_metrics", own_method("assigner", "get_box_metrics", one_metric)),
        ("TaskAlignedAssigner.get_box_metrics", method("assigner", "get_box_metrics", one_metric)),
        ("TaskAlignedAssigner.forward", method("assigner", "forward", half_scores)),
        ("assigner has other settings", setting("assigner.eps", 0.1)),
        ("proj has other settings", member("proj", lambda bins: bins * 2)),
        ("proj has other settings", member("proj", lambda bins: bins.mul_(2))),
        ("class_weights has other settings", setting("class_weights", torch.tensor(2.0))),
        (f"{LOSS}.bbox_iou", function(LOSS, "bbox_iou")),
        (f"{LOSS}.bbox_iou", function(LOSS, "bbox_iou", softened_iou)),
        (f"{LOSS}.bbox_iou", function(LOSS, "bbox_iou", Scaled)),
        (f"{LOSS}.dist2bbox", function(LOSS, "dist2bbox")),
        (f"{TAL}.bbox_iou", function(TAL, "bbox_iou")),
    ],
    "ultralytics-pose": [
        ("bce is a FocalLoss", member("bce", focal)),
        ("bce_pose has other settings", member("bce_pose", lambda _: nn.BCEWithLogitsLoss(reduction="sum"))),
        ("keypoint_loss is a Other", subclass("keypoint_loss")),
        ("keypoint_loss has other settings", setting("keypoint_loss.sigmas", torch.tensor(0.1))),
        ("keypoint_loss has hooks", hook("keypoint_loss")),
        ("KeypointLoss.forward", method("keypoint_loss", "forward")),
        ("its calculate_keypoints_loss", own_method("", "calculate_keypoints_loss")),
        ("v8PoseLoss.kpts_decode", method("", "kpts_decode", static)),
        ("v8PoseLoss.bbox_decode", inherited("bbox_decode")),
    ],
    "ultralytics-obb": [
        ("bce is a FocalLoss", member("bce", focal)),
        ("bbox_loss is a Other", subclass("bbox_loss")),
        ("bbox_loss has other settings", setting("bbox_loss.floor", 0.1)),
        ("bbox_loss.dfl_loss is a Other", subclass("bbox_loss.dfl_loss")),
        ("v8OBBLoss.bbox_decode", method("", "bbox_decode")),
        ("its calculate_angle_loss", own_method("", "calculate_angle_loss")),
        ("RotatedTaskAlignedAssigner.iou_calculation", method("assigner", "iou_calculation", halved)),
        (f"{LOSS}.probiou", function(LOSS, "probiou")),
        (f"{LOSS}.rbox2dist", function(LOSS, "rbox2dist")),
    ],
    "yolox": YOLOX,
    "libreyolo-yolox": YOLOX,
    "libreyolo-yolo9": [
        ("cls_loss.bce is a FocalLoss", member("cls_loss.bce", focal)),
        ("cls_loss.bce has other settings", member("cls_loss.bce", weighted)),
        ("cls_loss has hooks", hook("cls_loss")),
        ("box_loss is a Other", subclass("box_loss")),
        ("dfl_loss.forward", own_method("dfl_loss", "forward")),
        ("BoxLoss.forward", method("box_loss", "forward")),
        ("BoxMatcher.__call__", method("matcher", "__call__", half_matches)),
        ("its _global_cls_norm", own_method("", "_global_cls_norm")),
        (f"{YOLO9}.calculate_iou", function(YOLO9, "calculate_iou")),
        (f"{YOLO9}.calculate_iou", function(YOLO9, "calculate_iou", Scaled)),
    ],
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning", "ignore:User provided device_type:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("trainer", "what", "change"),
    [(name, what, change) for name, changes in CHANGES.items() for what, change in changes],
    indirect=["trainer"],
)
def test_a_changed_part_keeps_the_stock_computation(trainer, what, change, when, monkeypatch):
    criterion, changed = trainer.make(), trainer.make()
    plain = trainer.step(criterion)
    with monkeypatch.context() as context:
        change(changed, context)
        stock = trainer.step(changed)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(stock, plain, strict=True))
    criterion = trainer.make()
    with monkeypatch.context() as context, adapters.what_stays(trainer.package) as said:
        if when == "before":
            change(criterion, context)
            trainer.integration.patch()
        else:
            trainer.integration.patch()
            trainer.step(criterion)
            assert not [line for line in said if "keeps" in line]
            change(criterion, context)
        for _ in range(2):
            loss, grad = trainer.step(criterion)
            assert_close(loss, stock[0], "loss")
            assert_close(grad, stock[1], "gradient")
        kept = [line for line in said if "keeps the computation" in line]
        assert len(set(kept)) == len(kept) <= 2  # of the criterion, and of its assigner
        assert any(what in line for line in kept)
        said.clear()
        for undo in (trainer.integration.unpatch, context.undo)[:: 1 if when == "before" else -1]:
            undo()
    trainer.integration.patch()
    ours = trainer.step(trainer.make())
    assert_close(ours[1], plain[1], "gradient of ours", 1e-4)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ("ultralytics", "loss"),
        ("ultralytics-pose", "loss"),
        ("ultralytics-obb", "loss"),
        ("yolox", "get_losses"),
        ("libreyolo-yolox", "get_losses"),
        ("libreyolo-yolo9", "__call__"),
    ],
    indirect=["trainer"],
)
def test_a_loss_that_somebody_replaced_before_stays(trainer, name, monkeypatch):
    """Its wrapper has the name, the module and the inputs of the stock one."""
    criterion = trainer.make()
    plain, owner = trainer.step(criterion)[0], type(criterion)
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def doubled(*args: Any) -> Any:
        result = stock(*args)
        if isinstance(result, dict):
            return {**result, "total_loss": 2 * result["total_loss"]}
        return (2 * result[0], *result[1:])

    with monkeypatch.context() as context, adapters.what_stays(trainer.package) as said:
        context.setattr(owner, name, doubled)
        trainer.integration.patch()
        assert_close(trainer.step(criterion)[0], 2 * plain, "loss")
        assert any(f"{owner.__name__}.{name} was replaced" in line for line in said)
        said.clear()
        trainer.integration.unpatch()


@pytest.mark.peers
@pytest.mark.parametrize("trainer", ["ultralytics"], indirect=True)
def test_a_dict_of_gains_has_a_sentence_of_its_own(trainer):
    criterion = trainer.make()
    criterion.hyp = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
    with trainer.integration.patched(), pytest.raises(TypeError, match=r"model\.args must have the gains as attributes"):
        trainer.step(criterion)


SOURCE = """
from torch import nn

def helper(x):
    return x

def other(x):
    return 2 * x

class Term(nn.Module):
    def forward(self, x):
        return helper(x)

class Criterion:
    def __init__(self):
        self.bce, self.term = nn.BCEWithLogitsLoss(reduction="none"), Term()

    def loss(self, x):
        return [self.part(y) for y in x]

    def part(self, x):
        return self.term(x) + self.bce(x, x)

    def unused(self):
        return other(1)
"""


@pytest.fixture
def made(monkeypatch) -> SimpleNamespace:
    """A small trainer, and what watches its criterion."""
    module = types.ModuleType("made_trainer.loss")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(SOURCE, vars(module))
    members = {"bce": (BCE,), "term": ("made_trainer.loss.Term",)}
    stock = Stock(module.Criterion, "loss", members, lambda _, bce, term: {"bce": is_elementwise(bce)})
    return SimpleNamespace(module=module, stock=stock, criterion=module.Criterion())


def test_what_differs_has_a_name(made, monkeypatch):
    stock, criterion, module = made.stock, made.criterion, made.module

    def difference(owner: Any, name: str, value: Any) -> str | None:
        with monkeypatch.context() as context:
            context.setattr(owner, name, value)
            return stock.difference(criterion)

    assert stock.difference(criterion) is None
    assert difference(criterion, "bce", nn.BCEWithLogitsLoss()) == "bce has other settings"
    assert difference(criterion, "bce", nn.MSELoss()) == "bce is a MSELoss"
    assert difference(criterion, "part", lambda x: x) == "its part was replaced"
    assert difference(module.Criterion, "part", lambda self, x: x) == "Criterion.part was replaced"
    assert difference(module.Term, "forward", module.Criterion.part) == "Term.forward was replaced"
    assert difference(module, "helper", module.other) == "made_trainer.loss.helper was replaced"
    assert difference(module, "helper", functools.wraps(module.helper)(lambda x: x)) == "made_trainer.loss.helper was replaced"
    assert difference(module, "helper", torch.no_grad()(lambda x: x)) == "made_trainer.loss.helper was replaced"
    assert difference(module, "helper", functools.partial(module.helper)) == "made_trainer.loss.helper was replaced"
    assert difference(criterion.term, "forward", lambda x: x) == "term.forward was replaced"
    assert stock.difference(criterion) is None
    assert stock.difference(type("Other", (module.Criterion,), {})()) == "its class is another"


def test_what_makes_no_difference(made, monkeypatch):
    monkeypatch.setattr(made.module.Criterion, "unused", None)
    monkeypatch.setattr(made.module, "other", None)
    monkeypatch.setattr(made.module, "helper", torch.no_grad()(made.module.helper))
    made.criterion.something = made.criterion.unused = 1
    assert made.stock.difference(made.criterion) is None


def test_a_missing_member_is_an_error(made):
    del made.criterion.term
    with pytest.raises(AttributeError, match="term"):
        made.stock.difference(made.criterion)


def test_every_difference_is_said_once():
    with adapters.what_stays("made_trainer") as said:
        for name in ("Criterion", "Criterion", "Term"):
            say_what_stays("made_trainer", name, "bce has hooks")
        assert [line.partition(": ")[2] for line in said] == [
            f"{name} keeps the computation of made_trainer: bce has hooks" for name in ("Criterion", "Term")
        ]
        said.clear()
