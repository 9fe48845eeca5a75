"""What a trainer's own computation is made of, so that a part that somebody has changed is noticed and respected."""

import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from .._version import __version__

BCE = "torch.nn.modules.loss.BCEWithLogitsLoss"
_LIBRARIES = {"torch", "numpy", "triton_yolo", *sys.stdlib_module_names}
_ENTRIES = ("__call__", "forward")  # methods of a member that are called without their name
_hooks_of = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Functions(NamedTuple):
    """The functions of a computation: where they stand, what stood there, and the first that is not the trainer's own."""

    places: list[tuple[Any, str]]  # class or module, name
    values: list[Any]
    methods: list[frozenset[str]]  # of the object and of each member
    difference: str | None


class Stock:
    """A computation of a trainer: one of its methods, what that calls, and the members of its object that take part.

    A function is the trainer's own by where it was defined, so that it does not matter when somebody replaced it.

    Args:
        owner: the class of the trainer.
        name: its method, which is not replaced yet.
        members: path of attributes from an object of the class -> full names of the classes that may stand there.
        settings: called with an object and its members, all of their classes; path -> whether its settings are stock, too.
        is_open: whether the object may be of a subclass, as long as that has the same methods.
        aliases: names under which a module imports functions -> their own.
    """

    def __init__(
        self,
        owner: type,
        name: str,
        members: Mapping[str, Sequence[str]],
        settings: Callable[..., Mapping[str, bool]],
        *,
        is_open: bool = False,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._owner, self._name, self._method = owner, name, vars(owner)[name]
        self._package = _root(owner.__module__)
        self._members, self._settings, self._is_open = dict(members), settings, is_open
        self._aliases = dict(aliases or {})
        self._paths = ["", *self._members]
        self._get = [attrgetter(path) for path in self._members]
        self._functions: dict[tuple[type, ...], _Functions] = {}

    def difference(self, x: Any) -> str | None:
        """Say what differs from the trainer's own computation with ``x``, the first such thing, if anything does.

        Raises:
            AttributeError: a member is gone: this is not the trainer that the adapter was written for.
        """
        objects = [x, *[get(x) for get in self._get]]
        kinds = tuple(map(type, objects))
        functions = self._functions.get(kinds)
        if functions is None or [getattr(place, name, None) for place, name in functions.places] != functions.values:
            functions = self._functions[kinds] = self._look(kinds)
        if functions.difference is not None:
            return functions.difference
        for path, member, methods in zip(self._paths, objects, functions.methods, strict=True):
            if member is None:
                continue
            attributes = member.__dict__
            if not methods.isdisjoint(attributes):
                return f"{_dotted(path, min(methods.intersection(attributes)))} was replaced"
            if path and "_forward_hooks" in attributes and any(_hooks_of(member)):
                return f"{path} has hooks"
        return next((f"{path} has other settings" for path, is_own in self._settings(*objects).items() if not is_own), None)

    def _look(self, kinds: tuple[type, ...]) -> _Functions:
        found = self._other_kinds(kinds)
        places: dict[tuple[Any, str], Any] = {}
        method = _unwrapped(self._method)
        if self._is_own(method, self._owner, self._name):
            todo = list(_called(method, kinds[0]))
        else:
            found.append(f"{self._owner.__name__}.{self._name} was replaced")
            todo = []
        todo += [(kind, entry) for kind in kinds[1:] for entry in _ENTRIES if _definer(kind, entry)]
        while todo:
            place, name = todo.pop()
            value = getattr(place, name, None)
            if (place, name) in places or not callable(value):
                continue
            function = _unwrapped(value)
            is_own = self._is_own(function, place, name)
            if is_own and name not in _ENTRIES and _root(_home(function)) != self._package:
                continue  # of a library
            places[place, name] = value
            if not is_own:
                found.append(f"{place.__name__}.{name} was replaced")
            elif isinstance(function, types.FunctionType) and _root(_home(function)) == self._package:
                todo += _called(function, place)
        methods = [frozenset(name for place, name in places if place is kind) for kind in kinds]
        return _Functions(list(places), list(places.values()), methods, found[0] if found else None)

    def _other_kinds(self, kinds: tuple[type, ...]) -> list[str]:
        found = [] if self._is_open or kinds[0] is self._owner else ["its class is another"]
        for (path, names), kind in zip(self._members.items(), kinds[1:], strict=True):
            if f"{kind.__module__}.{kind.__qualname__}" not in names:
                found.append(f"{path} is a {kind.__qualname__}")
        return found

    def _is_own(self, function: Any, place: Any, name: str) -> bool:
        """Whether the trainer itself put a function there: one of its package that has this name, or of a library."""
        if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type)):
            return False
        root = _root(_home(function))
        if root != self._package:
            return root in _LIBRARIES
        definer = _definer(place, name)
        names = (f"{definer.__qualname__}.{name}",) if definer else (name, self._aliases.get(name))
        return function.__qualname__ in names


def is_elementwise(loss: nn.Module) -> bool:
    """Whether a loss of PyTorch gives its elements as they are: neither reduced nor weighted."""
    return loss.reduction == "none" and not any(weight is not None for weight in loss._buffers.values())


@functools.cache
def say_what_stays(package: str, name: str, difference: str) -> None:
    """Log, once for each difference, that objects of a class keep the computation of their package."""
    say = logging.getLogger(package).warning
    say(f"triton_yolo {__version__}: {name} keeps the computation of {package}: {difference}")


def _called(function: types.FunctionType, place: Any) -> Iterator[tuple[Any, str]]:
    """What a function may call by a name: methods of its class, if it stands in one, and globals of its module."""
    module = sys.modules[_home(function)]
    for name in _names(function.__code__):
        if isinstance(place, type) and _definer(place, name):
            yield place, name
        if name in vars(module):
            yield module, name


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _unwrapped(value: Any) -> Any:
    """What a decorator of a library, or one of our replacements, stands for."""
    while isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__") and _root(_home(value)) in _LIBRARIES:
        value = value.__wrapped__
    return value


def _definer(place: Any, name: str) -> type | None:
    """The class that a class has a method from."""
    bases = place.__mro__ if isinstance(place, type) else ()
    return next((base for base in bases if name in vars(base)), None)


def _home(function: Any) -> str:
    """The module that something was defined in; ``functools.wraps`` copies a function's ``__module__``."""
    module = function.__globals__.get("__name__") if isinstance(function, types.FunctionType) else function.__module__
    return module or "builtins"


def _root(module: str) -> str:
    return module.partition(".")[0]


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else f"its {name}"
