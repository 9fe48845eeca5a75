"""The LightningModule of the examples in Lightning's own Trainer."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench import peers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # Lightning advises about workers and logging


@pytest.fixture(scope="module")
def example():
    if not peers.is_installed("lightning"):
        pytest.skip("lightning is not installed; `make peers` installs it")
    with peers.contained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning_module

        yield lightning_module


QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


@pytest.mark.parametrize("loss", ["yolo11", "yolox"])
def test_training_in_mixed_precision_with_accumulation(example, loss, tmp_path):
    arguments = ["--loss", loss, "--epochs", "1", "--scenes", "16", "--imgsz", "64", "--batch", "4"]
    options = dict(precision="bf16-mixed", accumulate_grad_batches=2, default_root_dir=tmp_path)
    module = example.main(arguments, **QUIET, **options)
    names = {"loss", "num_fg"} | ({"box", "cls", "dfl"} if loss == "yolo11" else {"iou", "obj", "cls", "l1"})
    assert set(module.trainer.logged_metrics) == names
    assert all(value.isfinite() for value in module.trainer.logged_metrics.values())
    assert module.trainer.global_step == 2
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not any("criterion" in key for key in state)
    twin = example.LightningDetector(module.model.num_classes, loss)
    twin.load_state_dict(state)


def test_a_process_group_is_used(example, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = example.main(["--epochs", "1", "--scenes", "8", "--imgsz", "64"], **QUIET, enable_checkpointing=False)
        assert module.criterion.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_training_in_another_type(example, precision):
    arguments = ["--epochs", "1", "--scenes", "4", "--imgsz", "32", "--batch", "4"]
    module = example.main(arguments, **QUIET, precision=precision, enable_checkpointing=False)
    assert module.trainer.logged_metrics["loss"].isfinite()


def test_the_side_of_images_is_checked(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--imgsz", "100"])
    assert "--imgsz must be positive and divisible by 32" in capsys.readouterr().err
