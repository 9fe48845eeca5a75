"""The benchmark runs, refuses to time what disagrees, and its tables land between their markers."""

import ast
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import compare, competitors, gpu, loss, measure, results, scaling, tables, train_step
from bench.cases import make_case
from bench.compare import check
from bench.competitors import OURS, Step, Target
from bench.measure import Trial, interleaved
from tests.recorder import recorded
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


def test_a_peer_in_half_precision_has_a_time_and_its_error(tmp_path, monkeypatch):
    """Its arithmetic is off, its definition is not; one with another definition has no time."""

    def build(scale, error, case, target):
        preds, exact = target.leaf(torch.rand(4, generator=torch.Generator().manual_seed(0))), target.dtype == torch.float64
        off = 1 if exact or target.dtype == torch.float32 else 1 + error
        return Step(lambda: scale * off * preds.sum(), (preds,), target.device)

    builders = {OURS: partial(build, 1, 0), "rounds": partial(build, 1, 0.25), "another": partial(build, 2, 0)}
    arguments = bench.make_parser().parse_args(["loss", "--quick", "--dtype", "bfloat16"])
    arguments.copy_bandwidth = 1.0
    monkeypatch.setattr(compare, "try_alone", lambda limits, build, *args: measure._try(limits, build, *args))
    ours, rounds, another = compare.compare("w", builders, None, arguments)
    assert ours["failure"] is rounds["failure"] is None
    assert rounds["forward"]
    assert rounds["result"] / rounds["exact"] == pytest.approx(1.25, rel=0.01)
    assert compare.markdown(rounds).endswith("| 2.5e-01 |")
    assert another["failure"].startswith("gives ")
    assert compare.markdown(another).count("|") == compare.HEADER.splitlines()[0].count("|")


def test_what_disagrees_has_no_time():
    assert check(Trial(result=1.0001), 1.0, 1e-3).failure is None
    failure = check(Trial(result=1.1), 1.0, 1e-3).failure
    assert failure is not None
    assert "1.1" in failure


def dies(case, target):
    os.write(2, b"first\nlast words\n")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_dies_is_a_failure_with_its_last_words(monkeypatch):
    monkeypatch.setattr(measure, "get_context", lambda kind: multiprocessing.get_context("fork"))  # which imports nothing
    trial = measure.try_alone(measure.Limits(10, None, 1), dies, None, Target(torch.device("cpu"), torch.float32))
    assert trial == Trial(failure="ended by SIGKILL: last words")


def test_what_fails_costs_no_other_row(tmp_path, monkeypatch):
    file, whats = tmp_path / "results.jsonl", ("align_metric", "bbox_iou (CIoU)")
    monkeypatch.setattr(compare, "try_alone", lambda limits, build, *args: measure._try(limits, build, *args))
    monkeypatch.setattr(loss, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr("sys.argv", ["bench", "stages", *TINY, "--only", "nobody", "--out", str(file), "--what", *whats])
    monkeypatch.setitem(loss.OPERATIONS["stages"]["align_metric"], OURS, lambda case, target: 1 / 0)
    with pytest.raises(SystemExit, match=r"^align_metric: triton_yolo failed in float64: ZeroDivisionError: division by zero$"):
        bench.main()
    assert [json.loads(line)["what"] for line in file.read_text().splitlines()] == ["bbox_iou (CIoU)"]


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


def test_a_replayed_step_has_no_parts(monkeypatch):
    monkeypatch.setattr(train_step, "GRAPHED", "cpu")
    with recorded() as recorder:
        rows = train_step.measure("detector-yolo11", tiny_steps(), rounds=2, tolerance=1e-4)
        assert recorder.num_graphs == 2
    assert [row["name"].split()[0] for row in rows] == ["reference", OURS, "CUDA"]
    assert rows[2]["result"] == rows[1]["result"]
    assert len(rows[2]["step"]) == 2
    assert rows[2].keys() == rows[1].keys() - set(train_step.Parts._fields)
    line = train_step.markdown(rows[2] | {"step": [0.2], "busy": 0.1})
    assert line.endswith(" | 200.0 (200.0-200.0) |  |  |  |  |  | 50% |")


def test_time_on_the_device_counts_once():
    spans = [("kernel", 0, 10), ("kernel", 5, 10), ("gpu_memcpy", 8, 2), ("gpu_memset", 20, 5)]
    spans += [("cpu_op", 0, 100), ("gpu_user_annotation", 0, 100)]
    events = [{"cat": category, "ts": start, "dur": duration} for category, start, duration in spans]
    assert train_step.busy_seconds({"traceEvents": [{"ph": "M"}, *events]}) == pytest.approx(20e-6)


def test_the_order_rotates():
    assert "".join(interleaved("abc", 4)) == "abcbcacababc"


def test_exponent_of_a_power():
    assert scaling.exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 10)]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("parser", "command", "message"),
    [
        (bench, ["loss", "--what", "yolo12"], "argument --what: invalid choice: 'yolo12'"),
        (bench, ["train-step", "--what", "yolo11"], "argument --what: invalid choice: 'yolo11'"),
        (bench, ["scaling", "--batch-size", "0"], "argument --batch-size: must be a whole number, at least 1, got 0"),
        (bench, ["assign", "--imgsz", "100"], "argument --imgsz: must be divisible by 32, got 100"),
        (bench, ["host", "--rounds", "-1"], "argument --rounds: must be a whole number, at least 1, got -1"),
        (proofs, ["instructions", "--batch-size", "0"], "argument --batch-size: must be a whole number, at least 1, got 0"),
        (proofs, ["resources", "--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
    ],
)
def test_wrong_options_are_named(parser, command, message, capsys):
    with pytest.raises(SystemExit):
        parser.make_parser().parse_args(command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--rehearse",)])
def test_commands_of_a_gpu_machine_exist(options, tmp_path):
    arguments = bench.make_parser().parse_args(["gpu", "--out", str(tmp_path), *options])
    parts = {name: list(part(arguments)) for name, part in gpu.PARTS.items()}
    tasks = [task for part in parts.values() for task in part]
    benchmarks = [task.command[task.command.index("bench") + 1 :] for task in tasks if "bench" in task.command]
    assert {command[0] for command in benchmarks} >= {"loss", "stages", "assign", "tasks", "train-step"}
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
        for name in gpu.BY_DEFAULT:  # each alone in two minutes, but for what comes one after another at its slowest
            side_by_side = [task.limit for task in parts[name] if task.is_side_by_side]
            alone = sum(task.limit for task in parts[name] if not task.is_side_by_side)
            assert max(side_by_side, default=0) + alone <= (160 if name == "loss" else 120)
        assert not any(task.is_side_by_side for name in gpu.PARTS if name != "compile" for task in parts[name])


def python(code: str, limit: float = 5, *, is_side_by_side: bool = False) -> gpu.Task:
    return gpu.Task(code, limit, (sys.executable, "-c", code), is_side_by_side)


def test_a_task_that_fails_or_hangs_is_named(tmp_path):
    tasks = [python(code) for code in ("pass", "raise SystemExit(3)", "import time; time.sleep(60)")]
    tasks.append(gpu.Task("absent", 5, ("no-such-tool",)))
    end = time.perf_counter() + 60
    with (tmp_path / "log").open("w") as log:
        done = [one for task in tasks for one in gpu.attempt([task], {}, log, end)]
        late = gpu.attempt([python("import time; time.sleep(60)", 60)], {}, log, end=time.perf_counter() + 0.1)
    assert [one.status for one in done + late] == ["passed", "failed 3", "too long", "absent", "too long"]


def test_tasks_run_side_by_side(tmp_path):
    """Each waits for the other; and writes more than a pipe holds."""
    code = """
import sys, time
from pathlib import Path
mine, other = map(Path, sys.argv[1:])
print("x" * 200_000)
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""
    pairs = [("a", "b"), ("b", "a")]
    tasks = [
        gpu.Task(mine, 20, (sys.executable, "-c", code, str(tmp_path / mine), str(tmp_path / other)), True)
        for mine, other in pairs
    ]
    tasks.insert(1, python("print('alone')"))
    assert [[task.name for task in group] for group in gpu.together(tasks)] == [["a", "b"], ["print('alone')"]]
    with (tmp_path / "log").open("w") as log:
        done = gpu.attempt(tasks[::2], {}, log, time.perf_counter() + 60)
    assert [one.status for one in done] == ["passed", "passed"]
    assert (tmp_path / "log").stat().st_size > 400_000


def test_the_summary_is_short_and_says_what_matters(tmp_path, monkeypatch):
    tables = "noise\n" * 999 + "| yolo11 | triton_yolo | 0.1 |\n" + "3 passed in 5 s\n"
    long = "\n".join(f"FAILED tests/test_{i}.py" for i in range(2000))
    crash = "Traceback\nRuntimeError: no such device\n"
    done = [
        gpu.Done(gpu.Task(name, 5, ()), status, 1.25, output)
        for name, status, output in (("loss", "passed", tables), ("suite", "failed 1", long), ("memcheck", "failed 2", crash))
    ]
    text = gpu.summary(done)
    assert len(text) <= 8000
    assert "loss: passed in 1.2 s\n| yolo11 | triton_yolo | 0.1 |\n3 passed in 5 s" in text
    assert "FAILED tests/test_100.py" in text
    assert "RuntimeError: no such device" in text
    assert "noise" not in text
    assert results.provenance()["commit"] in text


@pytest.fixture
def git(tmp_path):
    """A function that runs git in a folder of its own: no setting, no other repository and no work on this one changes it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def run(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    return run


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of some sources, which the results are of."""
    package = tmp_path / "triton_yolo"
    shutil.copytree(BENCH.parent / "triton_yolo" / "losses", package / "losses", ignore=shutil.ignore_patterns("*.pyc"))
    (package / "losses" / "__pycache__").mkdir(exist_ok=True)
    (package / "losses.py").write_text("# comes before the folder of this name\n")
    (package / "run").write_text("#!/bin/sh\n")
    (package / "run").chmod(0o755)
    (package / "run.pyc").write_text("compiled")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(results, "FOLDER", tmp_path / "bench" / "results")
    results.FOLDER.mkdir(parents=True)
    results._commit.cache_clear()
    yield package
    results._commit.cache_clear()


def test_a_copy_without_git_names_its_sources(copied, git):
    """Also in a repository that does not have it."""
    without = results.provenance()["commit"]
    git("init")
    (copied.parent / ".gitignore").write_text("*.pyc\n")
    git("add", "triton_yolo")
    tree = git("write-tree", "--prefix=triton_yolo/")
    assert results.tree_id(copied) == tree
    assert without == f"with triton_yolo {tree[:7]}"
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "no benchmark")
    results._commit.cache_clear()
    assert results.provenance()["commit"] == without


def test_only_results_leave_a_tree_clean(copied, git):
    for name in ("results.py", "results/rows.jsonl"):
        (results.FOLDER.parent / name).write_text("as it was\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "all")
    commits = []
    for name in ("results/rows.jsonl", "results.py"):
        (results.FOLDER.parent / name).write_text("another\n")
        results._commit.cache_clear()
        commits.append(results.provenance()["commit"])
    head = git("describe", "--always")
    assert commits == [head, f"{head}-dirty"]


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
    assert line == "| `YOLO11Loss`, B=4, float32 | C, 2 threads, d, c | ultralytics 8 | 100.0 | 40.0, 20.0 | 2.5 | 2.0 |"
    assert tables.summary([ours, *others]) == ""


def test_the_summary_shows_the_newest_run_of_each_machine():
    old, new = ([row_of(name, 0.02, 1.0, run=run, dtype=dtype) for name in ("triton_yolo 1", "ultralytics 8")]
                for run, dtype in (("a", "float32"), ("b", "bfloat16")))  # fmt: skip
    elsewhere = [{**row, "machine": {"cpu": "D", "threads": 2}} for row in old]
    lines = tables.summary([*old, *elsewhere, *new]).splitlines()[2:]
    assert [("bfloat16" in line, "| D," in line) for line in lines] == [(True, False), (False, True)]


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


def test_our_version_is_the_one_that_runs(monkeypatch):
    monkeypatch.setattr(competitors, "version", lambda name: "0.0.1")  # of an older install in editable mode
    assert competitors.label(OURS) == f"{OURS} {competitors.ty.__version__}"
    assert competitors.label("numpy") == "numpy 0.0.1"
