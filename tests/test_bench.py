"""The benchmark runs, refuses to time what disagrees, and its tables land between their markers."""

import dataclasses
import json

import pytest
import torch

from bench import __main__ as bench
from bench import plot, resources, results, scaling
from bench.compare import check
from bench.measure import Trial

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


def test_what_disagrees_has_no_time():
    assert check(Trial(result=1.0001), 1.0, 1e-3).failure is None
    failure = check(Trial(result=1.1), 1.0, 1e-3).failure
    assert failure is not None
    assert "1.1" in failure


def test_exponent_of_a_power():
    assert scaling.exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 10)]) == pytest.approx(1.5)


def test_a_spill_is_past_the_bar_of_some_targets_only():
    row = resources.Resources("decode", "_kernel", "cuda:90", "float16", "channel-first", 4, 32, 0, 0, 128, 128, 5000, 0.1)
    spilling = dataclasses.replace(row, spill=8)
    assert resources.over_the_bar([row, spilling, dataclasses.replace(spilling, target="cuda:75")]) == [spilling]
    assert resources.figures([row, spilling])["spilled"] == {"decode channel-first _kernel": 8}


def test_tables_replace_what_is_between_their_markers():
    text = "a\n<!-- bench loss -->\nold\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    filled = "a\n<!-- bench loss -->\nnew\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    assert plot.fill(text, "loss", "new") == filled


def test_only_the_last_run_of_a_machine_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for run, value in (("a", 1), ("a", 2), ("b", 3), ("b", 4)):
        monkeypatch.setattr(results, "_RUN", run)
        results.append("loss", {"dtype": "float32", "batch_size": 1, "boxes": "coco", "value": value})
    assert [row["value"] for row in results.latest("loss")] == [3, 4]
    assert results.latest("stages") == []
    assert results.machine()["threads"] == torch.get_num_threads()
