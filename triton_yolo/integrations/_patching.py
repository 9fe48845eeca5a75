"""Replace attributes of another package, put them back, and keep what the replacements make."""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REQUIREMENTS = {
    "ultralytics": "ultralytics>=8.4.45,<8.5",
    "yolox": "pixeltable-yolox>=0.4.3,<0.5",
    "libreyolo": "libreyolo>=1.6,<1.7",
}
"""What our extras of these names install, for who has this package from elsewhere than an index."""

Replacement = tuple[Any, str, Callable]  # owner, attribute, what takes its place


@functools.lru_cache
@torch.inference_mode(False)  # a buffer made while validating must do for training too
def kept(make: Callable, device: torch.device | None, *args: Any, **settings: Any) -> Any:
    """Make a module and move it to a device: the same object for the same settings, so that no step makes or copies one.

    It is kept here and not in the caller, whose object is copied, saved and compared with others of its package.
    """
    return make(*args, **settings).to(device)


def import_trainer(extra: str, *names: str) -> list[Any]:
    """Import modules of a trainer, which our ``extra`` installs."""
    package = names[0].partition(".")[0]
    try:
        importlib.import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ImportError(f'{package} is not installed: pip install "{REQUIREMENTS[extra]}"', name=package) from error
        raise ImportError(f"{package} is installed, but does not import: {error}", name=package) from error
    return [importlib.import_module(name) for name in names]


def unexpected(subject: str, tested: str, what: str) -> RuntimeError:
    """The error for internals of a trainer that are not those that an adapter was written for."""
    return RuntimeError(
        f"{subject} is not what this adapter was written for ({tested}), or something else has changed it: {what}"
    )


def require(subject: str, tested: str, condition: bool, what: str) -> None:
    if not condition:
        raise unexpected(subject, tested, what)


class Patch:
    """Attributes of another package that can be replaced and put back.

    Args:
        find: called by ``patch``; looks at the package, raises if it is not as expected, and returns what to replace.
    """

    def __init__(self, find: Callable[[], list[Replacement]]) -> None:
        self._find = find
        self._saved: list[tuple[Any, str, Any, Callable]] = []

    @property
    def is_applied(self) -> bool:
        return bool(self._saved)

    def patch(self) -> None:
        """Replace. Nothing happens if it is done already."""
        if self.is_applied:
            return
        replacements = self._find()
        self._saved = [(owner, name, vars(owner)[name], new) for owner, name, new in replacements]
        for owner, name, new in replacements:
            setattr(owner, name, new)

    def unpatch(self) -> None:
        """Undo ``patch``. Nothing happens if nothing was replaced.

        Raises:
            RuntimeError: somebody else has replaced the same methods in the meantime.
        """
        for owner, name, _, new in self._saved:
            if vars(owner)[name] is not new:
                raise RuntimeError(f"{owner.__name__}.{name} was replaced again after patch(); undo that first")
        for owner, name, old, _ in self._saved:
            setattr(owner, name, old)
        self._saved = []

    @contextmanager
    def patched(self) -> Iterator[None]:
        """``patch`` for the length of a ``with`` block, unless it is done already."""
        was_applied = self.is_applied
        self.patch()
        try:
            yield
        finally:
            if not was_applied:
                self.unpatch()
