"""The benchmark runs, refuses to time what disagrees, and its tables land between their markers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as bench
from bench import report, results, scaling
from bench.compare import check
from bench.measure import Trial
from tests import peers

TINY = ["--quick", "--batch-size", "1", "--imgsz", "64", "--classes", "2", "--boxes", "lognormal", "--only", "reference"]


@pytest.mark.parametrize(("command", "what"), [("loss", "yolox"), ("stages", "align_metric"), ("assign", "SimOTAAssigner")])
def test_operations_are_measured(command, what, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["bench", command, *TINY, "--what", what, "--out", str(file)])
    bench.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["name"].split()[0] for row in rows} == {"triton_yolo", "reference"}
    assert all(row["failure"] is None and len(row["forward"]) == 3 for row in rows)
    assert all(f"| {row['what']} | {row['name']} |" in capsys.readouterr().out for row in rows[:1])
    assert {"commit", "date", "machine"} <= set(rows[0])


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
    monkeypatch.setattr("sys.argv", ["bench", "parity", "ultralytics", *options, "--data", str(tmp_path), "--out", str(file)])
    bench.main()
    patched, perturbed = (json.loads(line) for line in file.read_text().splitlines())
    assert (patched["name"], patched["dtype"], patched["epochs"]) == ("patched", "float64", 3)
    assert patched["largest_all"] < 1e-10 < 1e-8 < perturbed["largest_all"]
    assert patched["steps_within"] == patched["steps_an_epoch"] == 1
    assert patched["map50"] == pytest.approx(patched["stock_map50"], abs=1e-6)
    assert "3 epochs, float64" in capsys.readouterr().out


def test_what_disagrees_has_no_time():
    assert check(Trial(result=1.0001), 1.0, 1e-3).failure is None
    failure = check(Trial(result=1.1), 1.0, 1e-3).failure
    assert failure is not None
    assert "1.1" in failure


def test_exponent_of_a_power():
    assert scaling.exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 10)]) == pytest.approx(1.5)


def test_tables_replace_what_is_between_their_markers():
    text = "a\n<!-- bench loss -->\nold\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    filled = "a\n<!-- bench loss -->\nnew\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    assert report.fill(text, "loss", "new") == filled


def test_only_the_last_run_of_a_machine_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for run, value in (("a", 1), ("a", 2), ("b", 3), ("b", 4)):
        monkeypatch.setattr(results, "_RUN", run)
        results.append("loss", {"dtype": "float32", "batch_size": 1, "boxes": "coco", "value": value})
    assert [row["value"] for row in results.latest("loss")] == [3, 4]
    assert results.latest("stages") == []
    assert results.machine()["threads"] == torch.get_num_threads()
