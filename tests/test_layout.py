"""The house: no circle of imports, no long file, kernels of few arguments under names of their own, one place that launches."""

import ast
import statistics
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "triton_yolo"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(file.read_text()) for file in FILES}
TREES = {name.removesuffix(".__init__"): tree for name, tree in TREES.items()}


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, also inside functions."""
    package = name.split(".") if (PACKAGE.parent / Path(*name.split(".")) / "__init__.py").exists() else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in TREES else base
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "importlib.import_module"
            and name == "triton_yolo._backend"
        ):
            yield from ("triton_yolo.eager", "triton_yolo.kernels")


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")


def kernels() -> list[ast.FunctionDef]:
    return [node for tree in TREES.values() for node in tree.body if is_kernel(node)]


def test_imports_run_in_one_direction():
    graph = {name: set(imports(name, tree)) - {name} for name, tree in TREES.items()}
    assert "triton_yolo.eager" in graph["triton_yolo._backend"]
    list(TopologicalSorter(graph).static_order())  # raises a CycleError


def test_no_file_is_longer_than_350_lines():
    assert not [file.name for file in FILES if len(file.read_text().splitlines()) > 350]


def test_kernels_have_names_of_their_own_and_few_arguments():
    names = [kernel.name for kernel in kernels()]
    counts = [len(kernel.args.args) for kernel in kernels()]
    assert len(names) == len(set(names)) > 20
    assert statistics.median(counts) <= 16
    assert max(counts) <= 20, dict(zip(names, counts, strict=True))


def test_only_one_place_launches():
    launches = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches.append(name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warmup":
                launches.append(name)
    assert launches == ["triton_yolo.kernels.launch"]


def test_arguments_of_kernels_go_by_name():
    for name, tree in TREES.items():
        if name.startswith("triton_yolo.kernels."):
            for function in filter(is_kernel, tree.body):
                parameters = {argument.arg for argument in function.args.args}
                subscripts = [node.value for node in ast.walk(function) if isinstance(node, ast.Subscript)]
                assert not [ast.unparse(x) for x in subscripts if isinstance(x, ast.Name) and x.id in parameters], function.name
