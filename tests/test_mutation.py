"""Mistakes are planted where they are said to be, and nowhere else; those that cannot be are named."""

import ast
from pathlib import Path

import pytest

from tests.tools.mutation import Mutant, planted, sampled

SOURCE = """
LIMIT = 3.0

def nearest(points, at, eps=1 < 2):
    far = abs(points - at) + eps
    near = far.clamp(min=0)
    return near < LIMIT, far < LIMIT

class Box:
    def area(self):
        return self.w * self.h
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize(
    ("mutant", "old", "new"),
    [
        (Mutant("nearest", "_a < _b", "_a <= _b", 1, 2), "far < LIMIT", "far <= LIMIT"),
        (Mutant("nearest", "_a.clamp(min=0)", "_a"), "far.clamp(min=0)", "far"),
        (Mutant("nearest", "_a + _b", "_a", at="far"), "abs(points - at) + eps", "abs(points - at)"),
        (Mutant("Box.area", "_a * _b", "_b * _b"), "self.w * self.h", "self.h * self.h"),
        (Mutant("LIMIT", "_n", "_n + 1"), "LIMIT = 3.0", "LIMIT = 3.0 + 1"),
    ],
)
def test_one_expression_becomes_another(root, mutant, old, new):
    file, text = planted(mutant, root)
    assert file == root / "a.py"
    assert text == ast.unparse(ast.parse(SOURCE.replace(old, new))) + "\n"


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("farthest", "_a < _b", "_a <= _b"),
        Mutant("nearest", "_a < _b", "_a <= _b"),  # there are two
        Mutant("nearest", "_a * _b", "_a"),
        Mutant("nearest", "_a + _b", "_a", at="none"),
        Mutant("nearest", "_a + _b", "_a + _b"),
    ],
)
def test_what_does_not_apply_is_an_error(root, mutant):
    with pytest.raises(LookupError):
        planted(mutant, root)


def test_of_functions_with_one_name_the_one_that_fits_is_changed(root):
    (root / "b.py").write_text("def nearest(x):\n    return x < 1\n")
    assert "x <= 1" in planted(Mutant("nearest", "_a < _b", "_a <= _b"), root)[1]
    with pytest.raises(LookupError, match="not 5 in one place"):
        planted(Mutant("nearest", "_a < _b", "_a <= _b", of=5), root)
    with pytest.raises(LookupError, match="2 places"):
        sampled("nearest", root, 1)


def test_samples_outlive_a_renaming(root):
    sample = sampled("nearest", root, 3)
    (root / "a.py").rename(root / "b.py")
    (root / "b.py").write_text(SOURCE.replace("points", "xy").replace("far", "distance"))
    assert sampled("nearest", root, 3) == sample
    assert str(sample[0]) not in map(str, sampled("nearest", root, 3, without=[str(sample[0])]))
