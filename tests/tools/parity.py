"""A real trainer, stock and patched, from the same seed: every step's losses and what the trained models are worth."""

import argparse
import contextlib
import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import peers, results
from tests.compare import OF_A_STEP
from triton_yolo.integrations import ultralytics as integration

from .voc import write_yolo

CLASSES = ("RBC", "WBC", "Platelets")


class Run(NamedTuple):
    """Of one training: the losses of every step and the last metrics, by name."""

    steps: list[dict[str, float]]
    steps_an_epoch: int
    metrics: dict[str, float]
    seconds: float


def run(arguments: argparse.Namespace) -> None:
    if arguments.data is None:
        raise SystemExit("parity needs a folder with bccd/: TRITON_YOLO_DATA or --data")
    voc = (Path(arguments.data) / "bccd").resolve()
    torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in results.machine().items()))
    with tempfile.TemporaryDirectory() as name, peers.contained():
        data = write_yolo(voc, Path(name) / "data", CLASSES, arguments.images)
        same_weights: list[dict[str, float]] = []
        runs = {
            "stock": train(arguments, data, functools.partial(compared, same_weights)),
            "patched": train(arguments, data, integration.patched),
        }
        if arguments.perturb:
            runs["perturbed"] = train(arguments, data, contextlib.nullcontext, arguments.perturb)
    report(arguments, runs, same_weights)
    for name in list(runs)[1:]:
        results.append("parity", figures(arguments, runs["stock"], runs[name], name), arguments.out)


@contextlib.contextmanager
def compared(differences: list[dict[str, float]]) -> Iterator[None]:
    """Train stock, and at every step take the patched loss and its gradient of the same predictions too."""
    from ultralytics.nn.tasks import BaseModel

    stock = BaseModel.loss

    def loss(self: Any, batch: Any, preds: Any = None) -> Any:
        if not self.training:
            return stock(self, batch, preds)
        preds = self(batch["img"])
        result = stock(self, batch, preds)
        with integration.patched():
            patched = stock(self, batch, preds)
        (total, items), (our_total, our_items) = result, patched
        row = {name: relative(our_items[name], items[name]) for name in items}
        leaves = [branch[name] for branch in branches(preds) for name in ("boxes", "scores")]
        grads, ours = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (total, our_total))
        row["sum"] = relative(our_total.sum(), total.sum())
        row["gradient"] = max(map(relative, ours, grads))
        differences.append(row)
        return result

    BaseModel.loss = loss
    try:
        yield
    finally:
        BaseModel.loss = stock


def branches(preds: Mapping[str, Any]) -> list[Mapping[str, torch.Tensor]]:
    return [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def train(
    arguments: argparse.Namespace,
    data: Path,
    context: Callable[[], contextlib.AbstractContextManager[None]],
    perturbation: float = 0.0,
) -> Run:
    """Train with Ultralytics' own trainer; ``perturbation`` multiplies every weight by 1 + so much noise."""
    from ultralytics import YOLO

    steps: list[dict[str, float]] = []
    metrics: dict[str, float] = {}

    def perturb(trainer: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight *= 1 + perturbation * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    def record(trainer: Any) -> None:
        steps.append({**{k: float(v) for k, v in trainer.loss_items.items()}, "sum": trainer.loss.item()})

    def keep(trainer: Any) -> None:
        metrics.update({name.removeprefix("metrics/"): float(value) for name, value in trainer.metrics.items()})

    model = YOLO(f"{arguments.model}.yaml")
    if arguments.double:
        model.add_callback("on_pretrain_routine_end", in_double)
        model.add_callback("on_train_batch_start", lambda _: torch.set_default_dtype(torch.float64))
        model.add_callback("on_train_batch_end", lambda _: torch.set_default_dtype(torch.float32))
    if perturbation:
        model.add_callback("on_pretrain_routine_end", perturb)
    model.add_callback("on_train_batch_end", record)
    model.add_callback("on_fit_epoch_end", keep)
    start = time.perf_counter()
    with context():
        model.train(
            data=str(data), epochs=arguments.epochs, imgsz=arguments.imgsz, batch=arguments.batch_size, seed=0,
            deterministic=True, device="cpu", workers=0, pretrained=False, amp=False, plots=False, verbose=False,
            project=str(data.parent), name="run", exist_ok=True,
        )  # fmt: skip
    return Run(steps, len(model.trainer.train_loader), metrics, time.perf_counter() - start)


def in_double(trainer: Any) -> None:
    """Compute the steps in float64. The averaged model stays float32: the trainer validates it so, in place."""
    preprocess, update, rounded = trainer.preprocess_batch, trainer.ema.update, copy.deepcopy(trainer.model)

    def preprocess_double(batch: Mapping[str, Any]) -> dict[str, Any]:
        batch = preprocess(batch)
        return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}

    def update_rounded(model: torch.nn.Module) -> None:
        rounded.load_state_dict(model.state_dict())
        update(rounded)

    trainer.preprocess_batch, trainer.ema.update = preprocess_double, update_rounded
    trainer.model.double()


def report(arguments: argparse.Namespace, runs: dict[str, Run], same_weights: list[dict[str, float]]) -> None:
    stock, others = runs["stock"], {name: other for name, other in runs.items() if name != "stock"}
    print(
        f"\n{arguments.model}, {arguments.images} images of BCCD at {arguments.imgsz} px, batches of {arguments.batch_size}, "
        f"{arguments.epochs} epochs, {dtype(arguments)}; relative differences from the stock trainer's losses\n"
    )
    names = list(stock.steps[0])
    header = ["step", *(f"{name} {loss}" for name in others for loss in names)]
    print(f"| {' | '.join(header)} |\n|{'--:|' * len(header)}")
    for step in range(stock.steps_an_epoch):
        cells = [f"{difference(stock, other, step, loss):.1e}" for other in others.values() for loss in names]
        print(f"| {step + 1} | {' | '.join(cells)} |")
    print("\n| run | largest, first epoch | largest, all epochs | " + " | ".join(stock.metrics) + " | seconds |")
    print(f"|---|{'--:|' * (3 + len(stock.metrics))}")
    for name, other in runs.items():
        first, whole = (largest(stock, other, steps) for steps in (stock.steps_an_epoch, len(stock.steps)))
        values = " | ".join(f"{value:.5f}" for value in other.metrics.values())
        print(f"| {name} | {first:.1e} | {whole:.1e} | {values} | {other.seconds:.0f} |")
    columns = same_weights[0]
    print("\n| same weights at every step | " + " | ".join(columns) + f" |\n|---|{'--:|' * len(columns)}")
    for name, rows in (("first epoch", same_weights[: stock.steps_an_epoch]), ("all epochs", same_weights)):
        print(f"| {name} | " + " | ".join(f"{max(row[column] for row in rows):.1e}" for column in columns) + " |")
    print(f"\nwithin {OF_A_STEP} for the first {steps_within(stock, runs['patched'])} of {stock.steps_an_epoch} steps", end="")
    print(f", perturbed for {steps_within(stock, runs['perturbed'])}" if "perturbed" in runs else "")


def figures(arguments: argparse.Namespace, stock: Run, other: Run, name: str) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        **{key: getattr(arguments, key) for key in ("model", "images", "imgsz", "batch_size", "epochs")},
        "dtype": dtype(arguments),
        "device": "cpu",
        "name": name,
        "largest_first_epoch": largest(stock, other, stock.steps_an_epoch),
        "largest_all": largest(stock, other, len(stock.steps)),
        "steps_within": steps_within(stock, other),
        "steps_an_epoch": stock.steps_an_epoch,
        "map50": other.metrics["mAP50(B)"],
        "stock_map50": stock.metrics["mAP50(B)"],
    }


HEADER = (
    "| model | type | images | run | largest difference of a loss, first epoch | all epochs | steps within 1e-4 "
    "| mAP@50 (stock) |\n"
    "|---|---|--:|---|--:|--:|--:|--:|"
)


def markdown(row: dict[str, Any]) -> str:
    return (
        f"| {row['model']} | {row['dtype']} | {row['images']} | {row['name']} | {row['largest_first_epoch']:.1e} "
        f"| {row['largest_all']:.1e} | {row['steps_within']} of {row['steps_an_epoch']} | {row['map50']:.5f} "
        f"({row['stock_map50']:.5f}) |"
    )


def dtype(arguments: argparse.Namespace) -> str:
    return "float64" if arguments.double else "float32"


def steps_within(stock: Run, other: Run) -> int:
    """Steps of the first epoch before the first whose losses differ by more than the tolerance."""
    steps = range(stock.steps_an_epoch)
    return next((i for i in steps if any(difference(stock, other, i, n) > OF_A_STEP for n in stock.steps[0])), len(steps))


def difference(stock: Run, other: Run, step: int, loss: str) -> float:
    expected = stock.steps[step][loss]
    return abs(other.steps[step][loss] - expected) / max(abs(expected), 1e-12)


def largest(stock: Run, other: Run, num_steps: int) -> float:
    return max(difference(stock, other, step, loss) for step in range(num_steps) for loss in stock.steps[0])
