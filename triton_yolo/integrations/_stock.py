"""What a trainer's stock computation consists of, so that a part that somebody has changed is noticed and respected."""

import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

BCE = (nn.BCEWithLogitsLoss, {"weight": None, "pos_weight": None, "reduction": "none"})
Member = tuple[Any, Mapping[str, Any]]  # its class, or several; attributes that it must have
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stock:
    """A computation of a trainer's, as it was when this was made: functions, and members of the object that owns it.

    Args:
        classes: those whose methods compute it.
        members: path of attributes from the object -> what stands there.
        replaced: (class, name) of methods that this package takes the place of, or calls itself.
    """

    def __init__(
        self, classes: Iterable[type], members: Mapping[str, Member] | None = None, replaced: Iterable[tuple[type, str]] = ()
    ) -> None:
        classes, replaced = tuple(classes), tuple(replaced)
        self._members = {tuple(path.split(".")): member for path, member in (members or {}).items()}
        parts = list(_parts(classes, set(replaced)))
        # What was replaced before this was made is somebody else's already.
        self._foreign = next((name for _, _, part, name in parts if _is_foreign(part, classes[0])), None)
        self._parts = [(namespace, key, part, name) for namespace, key, part, name in parts]
        keys = {(owner, key) for owner in classes for key in vars(owner) if not key.startswith("__")}
        self._methods = {key for _, key in keys - set(replaced)}

    def difference(self, owner: Any = None) -> str | None:
        """Name what differs from the stock computation, the first such thing, if anything does.

        Raises:
            AttributeError: a member is gone: this is not the trainer that was tested.
        """
        if self._foreign is not None:
            return self._foreign
        for namespace, key, part, name in self._parts:
            if namespace.get(key) is not part:
                return name
        if owner is None:
            return None
        for key in vars(owner):
            if key in self._methods:
                return f"{type(owner).__name__}.{key}"
        for path, (kinds, attributes) in self._members.items():
            member = owner
            for key in path:
                member = getattr(member, key)
            if not (_is_stock(member, kinds, attributes) and self._methods.isdisjoint(getattr(member, "__dict__", ()))):
                return f"{type(owner).__name__}.{'.'.join(path)} ({type(member).__name__})"
        return None


def _is_stock(member: Any, kinds: Any, attributes: Mapping[str, Any]) -> bool:
    if type(member) not in (kinds if isinstance(kinds, tuple) else (kinds,)) or "forward" in getattr(member, "__dict__", ()):
        return False
    for key, value in attributes.items():
        have = getattr(member, key, None)
        if have is not value and have != value:
            return False
    return not (isinstance(member, nn.Module) and any(getattr(member, hooks) for hooks in _HOOKS))


def _parts(classes: tuple[type, ...], replaced: set[tuple[type, str]]) -> Iterator[tuple[Mapping[str, Any], str, Any, str]]:
    """(namespace, key, what stands there, its name) of the methods of classes, and of the functions that they call."""
    seen: set[tuple[int, str]] = set()
    for owner in classes:
        for key, part in list(vars(owner).items()):
            function = _function(part)
            if function is None or (key.startswith("__") and key != "__call__"):
                continue
            if (owner, key) not in replaced:
                yield vars(owner), key, part, f"{owner.__name__}.{key}"
            yield from _globals(function, seen)


def _globals(function: types.FunctionType, seen: set[tuple[int, str]]) -> Iterator[tuple[Mapping[str, Any], str, Any, str]]:
    namespace = function.__globals__
    for key in _names(function.__code__):
        part = namespace.get(key)
        if _function(part) is not None and (id(namespace), key) not in seen:
            seen.add((id(namespace), key))
            yield namespace, key, part, key
            if namespace["__name__"].partition(".")[0] == (part.__module__ or "").partition(".")[0]:
                yield from _globals(_function(part), seen)  # type: ignore[arg-type]


def _function(part: Any) -> types.FunctionType | None:
    if isinstance(part, (staticmethod, classmethod)):
        part = part.__func__
    if callable(part) and not isinstance(part, type):
        part = inspect.unwrap(part)
    return part if isinstance(part, types.FunctionType) else None


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _is_foreign(part: Any, owner: type) -> bool:
    """Whether a function is neither the trainer's own nor one of the libraries that it builds on."""
    root = (getattr(part, "__module__", None) or "").partition(".")[0]
    own = owner.__module__.partition(".")[0]
    return root not in (own, "torch", "numpy", "triton_yolo") and (root == "__main__" or root not in sys.stdlib_module_names)
