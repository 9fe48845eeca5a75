"""Train a small one-stage detector with the losses of ``triton_yolo``, on CPU or GPU.

Without ``--data`` it learns to find handwritten digits. ``torchrun --nproc-per-node 2 examples/train.py`` uses two processes.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from criteria import LOSSES, LossOutput, make_criterion
from data import load_data
from detector import Detector, feature_shapes
from evaluate import evaluate, summary
from pictures import draw_assignment, draw_loss, draw_predictions
from samples import Batch, Sample, collate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from triton_yolo.graphs import GraphedStep


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="Pascal VOC folder, YOLO data.yaml or COCO json; default: digits")
    parser.add_argument("--loss", choices=LOSSES, default="yolo11", help="also decides the head")
    parser.add_argument("--epochs", type=int, help="default: 16 for digits, 30 for other data")
    parser.add_argument("--steps", type=int, help="stop early after so many steps")
    parser.add_argument("--batch", type=int, default=16, help="images a step, of all processes together; default: %(default)s")
    parser.add_argument("--imgsz", type=int, help="side of the square image; default: 160 for digits, 320 for other data")
    parser.add_argument("--scenes", type=int, default=1024, help="digit scenes an epoch; default: %(default)s")
    parser.add_argument("--reg-max", type=int, default=16, help="bins of the distance distribution; default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16 on CPU, float16 on GPU")
    parser.add_argument(
        "--double", action="store_true", help="train in float64: two losses can be compared beyond its rounding"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of model and loss")
    parser.add_argument("--cuda-graph", action="store_true", help="replay steps as CUDA graphs, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare images")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/train"), help="folder of pictures and metrics; default: %(default)s"
    )
    options = parser.parse_args(argv)
    options.imgsz = options.imgsz or (160 if options.data is None else 320)
    options.epochs = options.epochs or (16 if options.data is None else 30)
    if options.imgsz % 32:
        parser.error("--imgsz must be divisible by 32")
    if options.batch % num_ranks():
        parser.error("--batch must be divisible by the number of processes")
    if num_ranks() > 1 and options.loss.startswith("reference"):
        parser.error("the reference losses run in one process")
    if options.cuda_graph and (options.compile or options.loss.startswith("reference") or num_ranks() > 1):
        parser.error("--cuda-graph takes one process, a loss that is no reference, and no --compile")
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    with processes(options.device) as device:
        torch.manual_seed(options.seed)
        train_data, val_data = load_data(options.data, options.imgsz, num_scenes=options.scenes, seed=options.seed)
        head = options.loss.removeprefix("reference-")
        model = Detector(len(train_data.classes), head, options.reg_max).to(device)
        start = time.perf_counter()
        curves = train(model, train_data, options, device)
        seconds = time.perf_counter() - start
        if rank() != 0:
            return {}
        metrics = {
            "loss": options.loss,
            "data": "digits" if options.data is None else options.data.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": options.epochs,
            "steps": len(curves["loss"]),
            "batch": options.batch,
            "imgsz": options.imgsz,
            "processes": num_ranks(),
            "device": device.type,
            "train_seconds": round(seconds, 1),
            **report(model, val_data, curves, options.output, device),
            "curves": curves,
        }
        (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1))
        print(f"mAP@50 {metrics['map50']:.3f}, {metrics['steps']} steps in {seconds:.0f} s; see {options.output}")
        return metrics


def train(model: Detector, data: Dataset[Sample], options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Train in place. Returns the loss and its terms at every step, of the whole batch."""
    group = dist.group.WORLD if num_ranks() > 1 else None
    model.to(torch.float64 if options.double else torch.float32)
    criterion = make_criterion(options.loss, model.num_classes, options.reg_max, group)
    step_loss = make_step(
        model, criterion, device, is_mixed=options.amp, is_compiled=options.compile, is_graphed=options.cuda_graph
    )
    loader = make_loader(data, options, device)
    planned = options.epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and device.type == "cuda")
    history = []
    with tqdm(total=min(planned, options.steps or planned), desc=options.loss, disable=rank() != 0) as bar:
        for step, batch in enumerate(batches(loader, options.epochs, bar.total)):
            if options.loss.endswith("yolox"):
                # As in the YOLOX paper, L1 joins for the last twentieth, when augmentation has done its work.
                criterion.use_l1 = step >= 0.95 * planned
            for parameters in optimizer.param_groups:
                parameters["lr"] = options.lr * schedule(step / planned)
            output = step_loss(batch.to(device))
            optimizer.zero_grad()
            scaler.scale(output.loss).backward()
            scaler.step(optimizer)
            scaler.update()
            terms = {name: value.detach() for name, value in output._asdict().items() if name != "num_fg"}
            history.append(torch.stack(list(terms.values())))
            bar.update()
            if step % 10 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items()})
    values = torch.stack(history)
    if group is not None:
        dist.all_reduce(values)
        values /= num_ranks()
    return dict(zip(terms, values.T.tolist(), strict=True))


def make_step(
    model: nn.Module,
    criterion: Callable[..., LossOutput],
    device: torch.device,
    *,
    is_mixed: bool,
    is_compiled: bool,
    is_graphed: bool = False,
) -> Callable[[Batch], LossOutput]:
    """Forward pass and loss of a batch; the gradients of several processes are averaged in its backward."""
    if num_ranks() > 1:
        model = DistributedDataParallel(model)
    dtype = next(model.parameters()).dtype
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    def forward(images: Tensor, targets: Tensor) -> LossOutput:
        with torch.autocast(device.type, half, enabled=is_mixed):
            outputs = model(images.to(dtype) / 255)
        return criterion(*(x.transpose(1, 2) for x in outputs), feature_shapes(images), targets.to(dtype))

    if is_compiled:
        forward = torch.compile(forward)
    if is_graphed:
        forward = GraphedStep(forward, model, criterion.to(device))
    return lambda batch: forward(batch.images, batch.targets)


def make_loader(data: Dataset[Sample], options: argparse.Namespace, device: torch.device) -> DataLoader[Batch]:
    """Batches of this process. Together the processes see the batches that one would see."""
    sampler = DistributedSampler(data, num_ranks(), rank(), seed=options.seed, drop_last=True)
    return DataLoader(
        data,
        batch_size=min(options.batch, len(data)) // num_ranks(),
        sampler=sampler,
        drop_last=True,
        collate_fn=collate,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
    )


def batches(loader: DataLoader[Batch], epochs: int, steps: int) -> Iterator[Batch]:
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        loader.dataset.epoch = epoch
        for batch in loader:
            yield batch
            steps -= 1
            if steps == 0:
                return


def schedule(progress: float, warm_up: float = 0.1) -> float:
    """Share of the highest learning rate: warm-up, then half a cosine.

    The warm-up is cubic: Adam's steps are as long where a gradient is only rounding as elsewhere, and a slow start keeps two
    equal trainings together longer.
    """
    if progress < warm_up:
        return 0.01 + 0.99 * (progress / warm_up) ** 3
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def report(
    model: Detector, data: Dataset[Sample], curves: dict[str, list[float]], output: Path, device: torch.device
) -> dict[str, Any]:
    """Write the pictures; return mean average precision."""
    model.eval().float()
    output.mkdir(parents=True, exist_ok=True)
    shown = [data[index] for index in range(min(6, len(data)))]
    draw_loss(output / "loss.png", curves)
    draw_predictions(output / "predictions.png", model, shown, data.classes, device)
    draw_assignment(output / "assignment.png", model, shown, device)
    return summary(evaluate(model, data, device), data.classes)


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; the device of this one."""
    if num_ranks() == 1:
        yield torch.device(device)
        return
    local = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield local
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
