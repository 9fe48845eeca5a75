"""Train a small one-stage detector with the losses of ``triton_yolo``, on CPU or GPU.

Without ``--data`` it learns to find handwritten digits. ``torchrun --nproc-per-node 2 examples/train.py`` uses two processes.
The folder ``--output`` receives pictures, ``metrics.json`` and, after every epoch, ``last.pt``, from which ``--resume`` goes on
with the options of then, and ``best.pt``, the weights of the highest mAP; ``examples/predict.py`` draws what they find.
With ``examples/`` on Python's path, either finds objects in images (B, 3, H, W), RGB in uint8, with sides that 32 divides:

    from checkpoint import load_model
    from evaluate import predict

    model, classes = load_model("runs/train/best.pt")
    detections = predict(model, images, threshold=0.3)  # a supervision.Detections for every image
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint import Run, head, read
from criteria import LOSSES, LossOutput, make_criterion
from data import load_data
from detector import Detector, feature_shapes
from devices import available
from evaluate import evaluate, summary
from pictures import draw_assignment, draw_loss, draw_map, draw_predictions
from samples import Batch, Sample, collate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from triton_yolo.graphs import GraphedStep


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--device", type=available, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare images")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/train"), help="folder of weights, pictures and metrics; default: %(default)s"
    )
    parser.add_argument("--validate-every", type=int, default=1, help="epochs from one validation to the next; default: 1")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output, with the options of that run")
    options = parser.parse_args(argv)
    if options.resume:
        options = parse_resumed(parser, argv, options.output / "last.pt")
    if options.imgsz is None:
        options.imgsz = 160 if options.data is None else 320
    if options.epochs is None:
        options.epochs = 16 if options.data is None else 30
    if options.imgsz % 32 or options.imgsz < 1:
        parser.error("--imgsz must be positive and divisible by 32")
    for name, least in LEAST.items():
        if (getattr(options, name) or 0) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= options.lr < math.inf:
        parser.error("--lr must be finite and at least 0")
    if options.batch % num_ranks():
        parser.error("--batch must be divisible by the number of processes")
    if num_ranks() > 1 and options.loss.startswith("reference"):
        parser.error("the reference losses run in one process")
    if options.cuda_graph and (options.compile or options.loss.startswith("reference") or num_ranks() > 1):
        parser.error("--cuda-graph takes one process, a loss that is no reference, and no --compile")
    return options


LEAST = {"batch": 1, "scenes": 1, "reg_max": 1, "validate_every": 1, "epochs": 0, "steps": 0, "seed": 0, "workers": 0}
FIXED = ("loss", "reg_max", "batch", "scenes", "double")  # so that a step of a resumed run is what it was


def parse_resumed(parser: argparse.ArgumentParser, argv: list[str] | None, file: Path) -> argparse.Namespace:
    """The options of the run that ``file`` is of, where ``argv`` gives no others."""
    if not file.is_file():
        parser.error(f"nothing to resume: {file} does not exist")
    try:
        saved = read(file)["options"]
    except ValueError as error:
        parser.error(f"--resume: {error}")
    parser.set_defaults(**{name: value for name, value in saved.items() if name not in ("resume", "output", "device", "steps")})
    options = parser.parse_args(argv)
    for name in FIXED:
        if getattr(options, name) != saved[name]:
            parser.error(f"--{name.replace('_', '-')} cannot change in a resumed run: it was {saved[name]}")
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    with processes(options.device) as device:
        torch.manual_seed(options.seed)
        try:
            train_data, val_data = load_data(options.data, options.imgsz, num_scenes=options.scenes, seed=options.seed)
        except (ValueError, OSError) as error:  # of what the user gave: no trace of calls
            raise SystemExit(f"--data: {error}") from error
        model = Detector(len(train_data.classes), head(options.loss), options.reg_max).to(device)
        run = Run(options, train_data.classes, partial(evaluate, model, val_data, device) if rank() == 0 else None)
        start = time.perf_counter()
        train(model, train_data, options, device, run)
        seconds = time.perf_counter() - start - run.seconds
        if rank() != 0:
            return {}
        metrics = {
            "loss": options.loss,
            "data": "digits" if options.data is None else options.data.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": options.epochs,
            "steps": run.num_steps,
            "batch": options.batch,
            "imgsz": options.imgsz,
            "processes": num_ranks(),
            "device": device.type,
            "train_seconds": round(seconds, 1),
            **summary(run.result, train_data.classes),
            "validations": [{"epoch": epoch, **score} for epoch, score in run.scores.items()],
            "curves": run.curves,
        }
        (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1))
        draw(model, val_data, run, device)
        print(f"mAP@50 {metrics['map50']:.3f}, {metrics['steps']} steps in {seconds:.0f} s; see {options.output}")
        return metrics


def train(
    model: Detector, data: Dataset[Sample], options: argparse.Namespace, device: torch.device, run: Run | None = None
) -> dict[str, list[float]]:
    """Train in place. Returns the loss and its terms at every step, of the whole batch."""
    run = run or Run(options)
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
    first = run.begin(model=model, optimizer=optimizer, scaler=scaler)
    stop = planned if options.steps is None else min(planned, options.steps)
    history = []
    with tqdm(total=stop, initial=min(first, stop), desc=options.loss, disable=rank() != 0) as bar:
        for step, batch in batches(loader, first, stop):
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
            if (step + 1) % len(loader) == 0 or step + 1 == stop:
                values = mean_of_ranks(torch.stack(history), group)
                run.end_epoch(
                    (step + 1) / len(loader), dict(zip(terms, values.T.tolist(), strict=True)), is_last=step + 1 == stop
                )
                history.clear()
    if first >= stop:
        run.end_epoch(first / len(loader), {}, is_last=True)
    return run.curves


def mean_of_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return values
    dist.all_reduce(values, group=group)
    return values / num_ranks()


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


def batches(loader: DataLoader[Batch], first: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Steps ``first`` to ``stop`` and their batches, over as many epochs as that takes."""
    for epoch in range(first // len(loader), math.ceil(stop / len(loader))):
        loader.sampler.set_epoch(epoch)
        loader.dataset.epoch = epoch
        for step, batch in enumerate(loader, epoch * len(loader)):
            if step >= stop:
                return
            if step >= first:
                yield step, batch


def schedule(progress: float, warm_up: float = 0.1) -> float:
    """Share of the highest learning rate: warm-up, then half a cosine.

    The warm-up is cubic: Adam's steps are as long where a gradient is only rounding as elsewhere, and a slow start keeps two
    equal trainings together longer.
    """
    if progress < warm_up:
        return 0.01 + 0.99 * (progress / warm_up) ** 3
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def draw(model: Detector, data: Dataset[Sample], run: Run, device: torch.device) -> None:
    """Write the pictures, those of images with the model as it is at the end."""
    model.eval().float()
    output = run.options.output
    shown = [data[index] for index in range(min(6, len(data)))]
    draw_loss(output / "loss.png", run.curves)
    draw_map(output / "map.png", run.scores)
    draw_predictions(output / "predictions.png", model, shown, data.classes, device)
    draw_assignment(output / "assignment.png", model, shown, device)


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
