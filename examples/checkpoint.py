"""What a run keeps in its folder: ``last.pt``, from which it resumes, and ``best.pt``, the weights of the highest mAP."""

import argparse
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detector import Detector
from supervision.metrics.mean_average_precision import MeanAveragePrecisionResult


class Run:
    """A training and what it went through: the loss and its terms at every step, mean average precision at every validation.

    Without ``validate`` nothing is written.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        classes: tuple[str, ...] = (),
        validate: Callable[[], MeanAveragePrecisionResult] | None = None,
    ) -> None:
        self.options, self.classes, self.validate = options, classes, validate
        self.curves: dict[str, list[float]] = {}
        self.scores: dict[float, dict[str, float]] = {}
        self.result: MeanAveragePrecisionResult | None = None
        self.seconds = 0.0

    def begin(self, **parts: Any) -> int:
        """Take all that has a ``state_dict``. Returns the step to start at: with ``--resume``, where ``last.pt`` ended."""
        self.parts = parts
        if self.options.resume:
            content = read(self.options.output / "last.pt")
            if content["classes"] != self.classes:
                raise SystemExit(f"--resume: the run learned {content['classes']}, the data has {self.classes}")
            for name, part in parts.items():
                part.load_state_dict(content[name])
            self.curves, self.scores = content["curves"], content["scores"]
        return self.num_steps

    @property
    def num_steps(self) -> int:
        return len(self.curves.get("loss", ()))

    def end_epoch(self, epoch: float, curves: dict[str, list[float]], *, is_last: bool) -> None:
        """Append to the curves, validate where that is due, and save."""
        for name, values in curves.items():
            self.curves.setdefault(name, []).extend(values)
        if self.validate is None:
            return
        start = time.perf_counter()
        is_best = False
        if is_last or epoch % self.options.validate_every == 0:
            self.result = self.validate()
            score = {name: round(getattr(self.result, name), 4) for name in ("map50", "map75", "map50_95")}
            is_best = all(score["map50_95"] >= other["map50_95"] for other in self.scores.values())
            self.scores[epoch] = score
        self.save(is_best)
        self.seconds += time.perf_counter() - start

    def save(self, is_best: bool) -> None:
        options = {name: str(x) if isinstance(x, Path) else x for name, x in vars(self.options).items()}
        content = {"options": options, "classes": self.classes, "scores": self.scores}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if is_best:
            write(self.options.output / "best.pt", {**content, "model": states["model"]})
        write(self.options.output / "last.pt", {**content, **states, "curves": self.curves})


def write(file: Path, content: dict[str, Any]) -> None:
    """Save under another name first: a file that a crash cut short is of no use."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    torch.save(content, unfinished)
    unfinished.replace(file)


def read(file: Path) -> dict[str, Any]:
    """What ``write`` saved of a run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if "imgsz" not in content["options"]:
            raise KeyError("imgsz")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{file} was not saved by examples/train.py") from error
    return content


def load_model(file: str | Path, device: torch.device | str = "cpu") -> tuple[Detector, tuple[str, ...]]:
    """The detector of ``last.pt`` or ``best.pt``, ready to predict, and the names of its classes."""
    content = read(Path(file))
    options, classes = content["options"], content["classes"]
    model = Detector(len(classes), head(options["loss"]), options["reg_max"])
    model.load_state_dict(content["model"])
    return model.to(device).eval(), classes


def head(loss: str) -> str:
    """The kind of head that a loss trains."""
    return loss.removeprefix("reference-")
