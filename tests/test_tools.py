"""The command lines of the proofs, and what of them needs neither interpreter nor compiler."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import peers
from tests.tools import __main__ as tools
from tests.tools import resources, small_step, tables


def write_voc(folder: Path) -> None:
    """Four noisy pictures of 64 px with a box in each."""
    import cv2

    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name in ("train", "val"):
        (folder / f"ImageSets/Main/{name}.txt").write_text("0 1 2 3")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for index in range(4):
        cv2.imwrite(str(folder / f"JPEGImages/{index}.jpg"), pixels[index])
        box = f"<xmin>{5 * index}</xmin><ymin>9</ymin><xmax>{9 * index + 20}</xmax><ymax>50</ymax>"
        (folder / f"Annotations/{index}.xml").write_text(
            "<annotation><size><width>64</width><height>64</height></size>"
            f"<object><name>RBC</name><bndbox>{box}</bndbox></object></annotation>"
        )


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ultralytics imports
def test_trainings_in_float64_are_the_same(tmp_path, monkeypatch, capsys):
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")
    write_voc(tmp_path / "bccd")
    file = tmp_path / "results.jsonl"
    # The trainer gathers the gradients of 64 images for a step.
    options = ["--double", "--imgsz", "64", "--batch-size", "64", "--epochs", "3", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["tools", "parity", "ultralytics", *options, "--data", str(tmp_path), "--out", str(file)])
    tools.main()
    patched, perturbed = (json.loads(line) for line in file.read_text().splitlines())
    assert (patched["name"], patched["dtype"], patched["epochs"]) == ("patched", "float64", 3)
    assert patched["largest_all"] < 1e-10 < 1e-8 < perturbed["largest_all"]
    assert patched["steps_within"] == patched["steps_an_epoch"] == 1
    assert patched["map50"] == pytest.approx(patched["stock_map50"], abs=1e-6)
    assert "3 epochs, float64" in capsys.readouterr().out


def test_a_spill_is_past_the_bar_of_some_targets_only():
    row = resources.Resources("decode", "_kernel", "cuda:90", "float16", "channel-first", 4, 32, 0, 0, 128, 128, 5000, 0.1)
    spilling = dataclasses.replace(row, spill=8)
    assert resources.over_the_bar([row, spilling, dataclasses.replace(spilling, target="cuda:75")]) == [spilling]
    assert resources.figures([row, spilling])["spilled"] == {"decode channel-first _kernel": 8}


def test_the_small_step_runs(capsys):
    small_step.main()
    assert len(capsys.readouterr().out.splitlines()) == 45


def test_figures_land_between_their_markers():
    commands = ("parity", "resources", "traffic")
    empty = "".join(f"<!-- bench {command} -->\n<!-- end of bench {command} -->\n" for command in commands)
    assert tables.fill_all(empty).count("|---|") >= len(commands)
