"""The small detector as a LightningModule: ``python examples/lightning_module.py --loss yolox --epochs 20``, on digits."""

import argparse
from typing import Any

import lightning
import torch
import torch.distributed as dist
from criteria import LOSSES, make_criterion
from detector import Detector, feature_shapes
from digits import DigitScenes
from samples import Batch, collate
from torch import Tensor
from torch.utils.data import DataLoader


class LightningDetector(lightning.LightningModule):
    def __init__(self, num_classes: int, loss: str = "yolo11", reg_max: int = 16, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.model = Detector(num_classes, loss, reg_max)
        self.criterion = make_criterion(loss, num_classes, reg_max)
        self.learning_rate = learning_rate

    def on_fit_start(self) -> None:
        if dist.is_initialized():  # one normaliser for all ranks: DDP's averaged gradients are those of the whole batch
            self.criterion.process_group = dist.group.WORLD

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs = self.model(batch.images.to(self.dtype) / 255)
        out = self.criterion(*(x.transpose(1, 2) for x in outputs), feature_shapes(batch.images), batch.targets)
        self.log_dict({name: value.float() for name, value in out._asdict().items()}, batch_size=len(batch.images))
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


def main(argv: list[str] | None = None, **options: Any) -> LightningDetector:
    """Train; ``options`` go to Lightning's Trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=LOSSES[:2], default="yolo11")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args(argv)
    if arguments.imgsz % 32 or arguments.imgsz < 1:
        parser.error("--imgsz must be positive and divisible by 32")
    lightning.seed_everything(0)
    data = DigitScenes(arguments.scenes, arguments.imgsz, is_train=True)
    loader = DataLoader(data, arguments.batch, shuffle=True, collate_fn=collate)
    module = LightningDetector(len(data.classes), arguments.loss)
    lightning.Trainer(max_epochs=arguments.epochs, log_every_n_steps=1, **options).fit(module, loader)
    return module


if __name__ == "__main__":
    main()
