"""Replace attributes of another package, and put them back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, str, Callable]  # owner, attribute, what takes its place


class Patch:
    """Attributes of another package that can be replaced and put back.

    Args:
        find: called by ``apply``; looks at the package, raises if it is not as expected, and returns what to replace.
    """

    def __init__(self, find: Callable[[], list[Replacement]]) -> None:
        self._find = find
        self._saved: list[tuple[Any, str, Any, Callable]] = []

    @property
    def is_applied(self) -> bool:
        return bool(self._saved)

    def apply(self) -> None:
        """Replace. Nothing happens if it is done already."""
        if self.is_applied:
            return
        replacements = self._find()
        self._saved = [(owner, name, vars(owner)[name], new) for owner, name, new in replacements]
        for owner, name, new in replacements:
            setattr(owner, name, new)

    def restore(self) -> None:
        """Put back. Nothing happens if nothing was replaced.

        Raises:
            RuntimeError: somebody else has replaced an attribute in the meantime.
        """
        for owner, name, _, new in self._saved:
            if vars(owner)[name] is not new:
                raise RuntimeError(f"{owner.__name__}.{name} was replaced again after patch(); undo that first")
        for owner, name, old, _ in self._saved:
            setattr(owner, name, old)
        self._saved = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace for the length of a ``with`` block, unless it is done already."""
        was_applied = self.is_applied
        self.apply()
        try:
            yield
        finally:
            if not was_applied:
                self.restore()
