"""Mistakes to plant: expressions of a function, found by its name and a pattern, and replaced.

A pattern is Python in which ``_a``, ``_b``, ... stand for any expression and ``_n`` for a number: ``_a < _b`` is every strict
comparison. So a mutant outlives the renaming of files, arguments and variables; one that does not apply any more raises.
"""

import ast
import copy
import hashlib
import multiprocessing
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("triton_yolo", "reference", "tests", "bench")
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "triton"])  # which take longer to import than a test takes
_ANYTHING, _NUMBER = re.compile("_[a-m]"), "_n"

_MODULES, _EXTREMES = ("torch", "tl"), (("minimum", "maximum"), ("maximum", "minimum"))
SLIPS = (
    ("_a < _b", "_a <= _b"), ("_a <= _b", "_a < _b"), ("_a > _b", "_a >= _b"), ("_a >= _b", "_a > _b"),
    ("_a == _b", "_a != _b"), ("_a + _b", "_a - _b"), ("_a - _b", "_a + _b"), ("_a * _b", "_a / _b"), ("_a / _b", "_a * _b"),
    ("-_a", "_a"), ("_a & _b", "_a | _b"), ("_a | _b", "_a & _b"),
    ("_a * _n", "_a * (_n + 1)"), ("_n * _a", "(_n + 1) * _a"), ("_a / _n", "_a / (_n + 1)"), ("_n - _a", "_n + 1 - _a"),
    *((f"{m}.{old}(_a, _b)", f"{m}.{new}(_a, _b)") for m in _MODULES for old, new in _EXTREMES),
    ("tl.min(_a, _b)", "tl.max(_a, _b)"), ("tl.max(_a, _b)", "tl.min(_a, _b)"),
    *((f"{m}.where(_a, _b, _c)", f"{m}.where(_a, _c, _b)") for m in _MODULES),
    ("_a.where(_b, _c)", "_c.where(_b, _a)"), ("_a.clamp(min=_n)", "_a.clamp(min=_n + 1)"), ("_a.clamp(min=_b)", "_a"),
    ("_a.floor()", "_a.ceil()"), ("_a.ceil()", "_a.floor()"), ("_a.square()", "_a.abs()"),
)  # fmt: skip
"""What the hand may do anywhere."""


class Mutant(NamedTuple):
    """In ``function`` ("name", "Class.method", or a constant of a module) the ``nth`` of ``of`` matches becomes another.

    Matches count from the outermost expression on, line by line; ``at`` looks at assignments to that name only.
    """

    function: str
    pattern: str
    replacement: str
    nth: int = 0
    of: int = 1
    at: str | None = None

    def __str__(self) -> str:
        return f"{self.function}: {self.pattern} -> {self.replacement}" + (f", {self.nth + 1}." if self.of > 1 else "")


class Place(NamedTuple):
    file: Path
    module: ast.Module
    node: ast.stmt


def planted(mutant: Mutant, root: Path) -> tuple[Path, str]:
    """The file below ``root`` with the function, and its new text. Of several of one name, one must have so many matches."""
    places = {place: list(matches(_part(place.node, mutant.at), mutant.pattern)) for place in find(mutant.function, root)}
    fitting = [place for place, found in places.items() if len(found) == mutant.of]
    if len(fitting) != 1:
        raise LookupError(f"{mutant}: {[len(found) for found in places.values()]} matches, not {mutant.of} in one place")
    (place,) = fitting
    target, values = places[place][mutant.nth]
    changed = _filled(mutant.replacement, values)
    if ast.dump(changed) == ast.dump(target):
        raise LookupError(f"{mutant}: changes nothing")
    module = _Substitute({id(target): changed}).visit(place.module)
    return place.file, ast.unparse(ast.fix_missing_locations(module)) + "\n"


class Done(NamedTuple):
    returncode: int | None
    output: str


def run(mutant: Mutant, root: str, test: str, folder: Path, **environment: str) -> Done:
    """Run a test on a copy of the repository in ``folder`` that has the mutant in what lies below ``root``."""
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "plots"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    file, text = planted(mutant, folder / root)
    file.write_text(text)
    output = folder / "output.txt"
    process = _PROCESSES.Process(target=_test, args=(folder, test.split(), environment, output))
    process.start()
    process.join()
    return Done(process.exitcode, output.read_text())


def _test(folder: Path, tests: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """Exit as pytest does in ``folder``, in a process that has imported no package of this repository but what runs this."""
    import pytest

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    os.chdir(folder)
    os.environ.update(environment, PYTHONPATH=str(folder))
    sys.path.insert(0, str(folder))
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    except BaseException:
        traceback.print_exc()
        code = pytest.ExitCode.INTERNAL_ERROR
    sys.exit(code)


def sampled(function: str, root: Path, number: int, without: Sequence[str] = ()) -> list[Mutant]:
    """Some of the slips that are possible in a function, always the same ones; ``without`` are the names of others."""
    places, found = find(function, root), []
    if len(places) > 1:
        raise LookupError(f"{function} is defined in {len(places)} places")
    ((_, _, node),) = places
    for pattern, replacement in SLIPS:
        count = sum(1 for _ in matches(node, pattern))
        found += [Mutant(function, pattern, replacement, nth, count) for nth in range(count)]
    found = [mutant for mutant in found if str(mutant) not in without]
    if len(found) < number:
        raise LookupError(f"{function}: {len(found)} slips are possible, not {number}")
    return sorted(found, key=lambda mutant: hashlib.sha256(str(mutant).encode()).digest())[:number]


def find(name: str, root: Path) -> list[Place]:
    """Where below ``root`` something is defined."""
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    last = name.rpartition(".")[2]
    modules = [(file, ast.parse(text)) for file in files if last in (text := file.read_text())]
    found = [Place(file, module, node) for file, module in modules for node in _named(module, name)]
    if not found:
        raise LookupError(f"{name} is defined nowhere in {root}")
    return found


def matches(node: ast.AST, pattern: str) -> Iterator[tuple[ast.expr, Mapping[str, ast.expr]]]:
    """Expressions below ``node`` that a pattern describes, and what its letters stand for."""
    wanted = ast.parse(pattern, mode="eval").body
    for part in _in_order(node):
        values: dict[str, ast.expr] = {}
        if isinstance(part, ast.UnaryOp) and isinstance(part.operand, ast.Constant):
            continue  # a negative number, of an axis for instance
        if isinstance(part, ast.expr) and _fits(wanted, part, values):
            yield part, values


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("args", "returns", "annotation") or isinstance(node, ast.Call):  # nothing of a signature
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _in_order(child)


def _fits(pattern: object, node: object, values: dict[str, ast.expr]) -> bool:
    if isinstance(pattern, ast.Name) and _ANYTHING.fullmatch(pattern.id):
        known = values.setdefault(pattern.id, node)
        return isinstance(node, ast.expr) and ast.dump(known) == ast.dump(node)
    if isinstance(pattern, ast.Name) and pattern.id == _NUMBER:
        values[_NUMBER] = node
        return isinstance(node, ast.Constant) and type(node.value) in (int, float)
    if isinstance(pattern, ast.AST):
        fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
        return type(pattern) is type(node) and all(_fits(getattr(pattern, f), getattr(node, f), values) for f in fields)
    if isinstance(pattern, list):
        return isinstance(node, list) and len(pattern) == len(node) and all(_fits(a, b, values) for a, b in zip(pattern, node))  # noqa: B905
    return pattern == node and type(pattern) is type(node)


def _filled(replacement: str, values: Mapping[str, ast.expr]) -> ast.expr:
    tree = ast.parse(replacement, mode="eval").body
    names = {id(n): copy.deepcopy(values[n.id]) for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in values}
    return _Substitute(names).visit(tree)


class _Substitute(ast.NodeTransformer):
    def __init__(self, nodes: Mapping[int, ast.AST]) -> None:
        self._nodes = nodes

    def visit(self, node: ast.AST) -> ast.AST:
        return self._nodes[id(node)] if id(node) in self._nodes else super().visit(node)


def _part(node: ast.stmt, at: str | None) -> ast.AST:
    """The assignments to one name, wherever in a function; or all of it."""
    if at is None:
        return node
    kept = [n for n in ast.walk(node) if isinstance(n, ast.Assign | ast.AugAssign) and at in _targets(n)]
    if not kept:
        raise LookupError(f"{ast.unparse(node).splitlines()[0]} assigns nothing to {at}")
    return ast.Module(kept, [])


def _named(module: ast.Module, name: str) -> Iterator[ast.stmt]:
    *owner, last = name.split(".")
    body: list[ast.stmt] = module.body
    for part in owner:
        body = [n for c in body if isinstance(c, ast.ClassDef) and c.name == part for n in c.body]
    for node in body:
        if (isinstance(node, ast.FunctionDef) and node.name == last) or last in _targets(node):
            yield node


def _targets(node: ast.stmt) -> list[str]:
    """Names that a statement assigns to."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AugAssign | ast.AnnAssign)
        else []
    )
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
