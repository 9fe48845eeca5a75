"""The benchmark runs, refuses to time what disagrees, and its tables land between their markers."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import gpu, results, scaling, tables, train_step
from bench.cases import make_case
from bench.compare import check
from bench.competitors import OURS, Target
from bench.measure import Trial, interleaved
from tests.tools import __main__ as proofs

BENCH = Path(bench.__file__).parent
TINY = ["--quick", "--batch-size", "1", "--imgsz", "64", "--classes", "2", "--boxes", "lognormal"]


@pytest.mark.parametrize(("command", "what"), [("loss", "yolox"), ("stages", "align_metric"), ("assign", "SimOTAAssigner")])
def test_operations_are_measured(command, what, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["bench", command, *TINY, "--only", "reference", "--what", what, "--out", str(file)])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["detector-yolo11", "detector-yolox", pytest.param("yolo11n", marks=pytest.mark.peers)])
def test_training_steps_are_measured(what, dtype, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["bench", "train-step", *TINY, "--what", what, "--dtype", dtype, "--out", str(file)])
    bench.main()
    before, after = (json.loads(line) for line in file.read_text().splitlines())
    assert before["name"].split()[0] in ("reference", "ultralytics")
    assert after["name"].split()[0] == OURS
    assert after["result"] == pytest.approx(before["result"], rel=train_step.TOLERANCE[dtype])
    for row in (before, after):
        assert all(len(row[name]) == 3 and min(row[name]) > 0 for name in ("step", *train_step.Parts._fields))
    lines = [train_step.HEADER, train_step.markdown(before), train_step.markdown(after)]
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    assert tables.table([before, after], train_step.HEADER, train_step.markdown).endswith("\n".join(lines))


def test_a_row_adds_up():
    seconds = {"model_forward": 0.2, "loss_forward": 0.15, "loss_backward": 0.05, "model_backward": 0.5, "optimizer": 0.1}
    row = {"what": "m", "name": "n", "failure": None, "step": [0.9, 0.9], "busy": 0.6}
    row |= {part: [value, value] for part, value in seconds.items()}
    expected = "| m | n | 900.0 (900.0-900.0) | 200.0 | 200.0 (150.0 + 50.0) | 500.0 | 100.0 | 20.0% | 33% |"
    assert train_step.markdown(row) == expected
    assert train_step.markdown({**row, "busy": None}) == expected.replace(" 33% ", "  ")


def tiny_steps():
    case = make_case("lognormal", batch_size=1, imgsz=64, num_classes=2)
    return train_step.MODELS["detector-yolo11"](case, Target(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("name", ["reference", OURS])
def test_a_step_in_parts_is_the_whole_step(name):
    step = tiny_steps()[name]
    seen = []

    def keep(optimizer, *_):
        seen.append([weight.grad.clone() for group in optimizer.param_groups for weight in group["params"]])

    step.optimizer.register_step_pre_hook(keep)
    loss, _ = step.whole()
    step.split()
    assert step.whole()[0] == loss, "the weights have moved"
    whole, parts, _ = seen
    assert any(grad.any() for grad in whole)
    torch.testing.assert_close(parts, whole)


def test_steps_whose_losses_disagree_have_no_time():
    steps = tiny_steps()
    stock = steps["reference"]
    steps["reference"] = stock._replace(loss=lambda outputs: 2 * stock.loss(outputs))
    (row,) = train_step.measure("detector-yolo11", steps, rounds=1, tolerance=1e-4)
    assert row.keys() == {"what", "name", "failure"}
    assert train_step.markdown(row).startswith("| detector-yolo11 | reference | gives ")


def test_time_on_the_device_counts_once():
    spans = [("kernel", 0, 10), ("kernel", 5, 10), ("gpu_memcpy", 8, 2), ("gpu_memset", 20, 5)]
    spans += [("cpu_op", 0, 100), ("gpu_user_annotation", 0, 100)]
    events = [{"cat": category, "ts": start, "dur": duration} for category, start, duration in spans]
    assert train_step.busy_seconds({"traceEvents": [{"ph": "M"}, *events]}) == pytest.approx(20e-6)


def test_the_order_rotates():
    assert "".join(interleaved("abc", 4)) == "abcbcacababc"


def test_exponent_of_a_power():
    assert scaling.exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 10)]) == pytest.approx(1.5)


@pytest.mark.parametrize("options", [(), ("--rehearse",)])
def test_commands_of_a_gpu_machine_exist(options, tmp_path):
    arguments = bench.make_parser().parse_args(["gpu", "--out", str(tmp_path), *options])
    tasks = [task for part in gpu.PARTS.values() for task in part(arguments)]
    benchmarks = [task.command[task.command.index("bench") + 1 :] for task in tasks if "bench" in task.command]
    assert {command[0] for command in benchmarks} >= {"loss", "stages", "assign", "train-step"}
    for command in benchmarks:
        bench.make_parser().parse_args(command)
    tools = [task.command[task.command.index("tests.tools") + 1 :] for task in tasks if "tests.tools" in task.command]
    assert tools
    for command in tools:
        proofs.make_parser().parse_args(command)
    files = [
        word.partition("::")[0] for task in tasks for word in task.command if word.startswith("tests") and word != "tests.tools"
    ]
    assert files
    assert all(Path(file).exists() for file in files)
    if not options:
        assert sum(task.limit for task in tasks) < 2400  # the most that they may take; nine minutes are expected


def test_a_task_that_fails_or_hangs_is_named(tmp_path):
    commands = {code: (sys.executable, "-c", code) for code in ("pass", "raise SystemExit(3)", "import time; time.sleep(60)")}
    with (tmp_path / "log").open("w") as log:
        results = [gpu.attempt(gpu.Task(code, 5, command), {}, log.fileno(), 5) for code, command in commands.items()]
        results.append(gpu.attempt(gpu.Task("absent", 5, ("no-such-tool",)), {}, log.fileno(), 5))
    assert results == ["passed", "failed 3", "too long", "absent"]


def test_tables_replace_what_is_between_their_markers():
    text = "a\n<!-- bench loss -->\nold\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    filled = "a\n<!-- bench loss -->\nnew\n<!-- end of bench loss -->\nb <!-- bench stages --> c"
    assert tables.fill(text, "loss", "new") == filled


def row_of(name: str, seconds: float, x_time: float | None, **changes) -> dict:
    row = dict(run="a", machine={"cpu": "C", "threads": 2}, date="d", commit="c", what="yolo11", dtype="float32", batch_size=4)
    times = dict(forward=[seconds], backward=[seconds], x_time=x_time, x_memory=2.0)
    return {**row, "boxes": "coco", "name": name, **times, **changes}


def test_the_summary_pairs_ours_with_other_projects_of_the_same_run():
    ours, theirs = row_of("triton_yolo 1", 0.02, 1.0), row_of("ultralytics 8", 0.05, 2.5)
    others = [
        row_of("reference", 0.1, 5.0),
        row_of("CUDA graph of triton_yolo", 0.01, 0.5),
        row_of("libreyolo 1", 0, None),
        row_of("ultralytics 8", 0.05, 2.5, run="b"),
    ]
    *_, line = tables.summary([ours, *others, theirs]).splitlines()
    assert line == "| `YOLO11Loss`, B=4 | C, 2 threads, d, c | ultralytics 8 | 100.0 | 40.0 | 2.5 | 2.0 |"
    assert tables.summary([ours, *others]) == ""


def test_a_run_is_of_one_commit(monkeypatch):
    first = results.provenance()["commit"]
    monkeypatch.setattr(results, "_output", lambda *command: "what the first saved result made of the tree")
    assert results.provenance()["commit"] == first


def test_only_the_last_run_of_a_machine_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for run, what, value in (("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "x", 4)):
        monkeypatch.setattr(results, "_RUN", run)
        results.append("loss", {"dtype": "float32", "batch_size": 1, "boxes": "coco", "what": what, "value": value})
    assert [row["value"] for row in results.latest("loss")] == [3, 4, 2]  # b measured x alone
    assert results.latest("stages") == []
    assert results.machine()["threads"] == torch.get_num_threads()


def test_nothing_of_the_tests_or_examples_is_imported():
    """The benchmark runs without them; what it starts as processes of their own is another matter."""
    found = set()
    for file in BENCH.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    assert {"triton_yolo", "reference", "torch"} <= found
    assert not found & {"tests", "examples"}


def test_every_plot_is_shown():
    text = (BENCH.parent / "docs" / "benchmarks.md").read_text()
    assert all(f"bench/plots/{file.name}" in text for file in (BENCH / "plots").iterdir())
