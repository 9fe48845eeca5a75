"""How an operation becomes an operator of PyTorch: everything follows from the fields of its inputs and outputs."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _backend

_LIBRARY = torch.library.Library("triton_yolo", "DEF")
_SCHEMAS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
    str: "str",
    tuple[int, ...]: "SymInt[]",
    tuple[float, ...]: "float[]",
}
Outputs = TypeVar("Outputs", bound=tuple)


class _Field(NamedTuple):
    name: str
    kind: Any
    parts: tuple["_Field", ...]  # of a field that is a NamedTuple itself

    @property
    def width(self) -> int:
        return max(len(self.parts), 1)


def _fields(kind: Any) -> tuple[_Field, ...]:
    hints = get_type_hints(kind)
    return tuple(_Field(name, hints[name], () if hints[name] in _SCHEMAS else _fields(hints[name])) for name in kind._fields)


class Operation(Generic[Outputs]):
    """An operation, called with its inputs and returning its outputs.

    Args:
        name: of the operator in ``torch.ops.triton_yolo``, and of the function that both backends have for it.
        inputs: the NamedTuple of its inputs, with ``allocate`` that makes the outputs. Fields that are NamedTuples lie flat
            in the operator's schema.
        gradient: the operation that computes the gradient of the first output.
        check: called with the inputs before every run, not while a graph is traced.
    """

    def __init__(
        self, name: str, inputs: Any, *, gradient: "Operation | None" = None, check: Callable[[Any], None] | None = None
    ) -> None:
        self.name, self.inputs = name, inputs
        self.outputs = get_type_hints(inputs.allocate)["return"]
        self.fields = _fields(inputs)
        arguments = [f"{_SCHEMAS[part.kind]} {part.name}" for field in self.fields for part in field.parts or (field,)]
        results = ", ".join(["Tensor"] * len(self.outputs._fields))
        _LIBRARY.define(f"{name}({', '.join(arguments)}) -> ({results})")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"triton_yolo::{name}", self._fake, lib=_LIBRARY)
        self.operator = getattr(torch.ops.triton_yolo, name).default
        self._check = check
        self._differentiable = None if gradient is None else _differentiable(self, gradient)

    def __call__(self, x: Any) -> Outputs:
        if self._differentiable is not None and torch.is_grad_enabled():
            result = self._differentiable(*self.flat(x))
        else:
            result = self.operator(*self.flat(x))
        return self.outputs._make(result if isinstance(result, tuple) else (result,))

    def flat(self, x: Any) -> list[Any]:
        """The inputs as the operator takes them."""
        result: list[Any] = []
        for field, value in zip(self.fields, x, strict=True):
            if field.parts:
                result.extend(value)
            else:
                result.append(value)
        return result

    def nested(self, flat: tuple[Any, ...]) -> Any:
        """The opposite of ``flat``. The operator hands tuples over as lists."""
        values, start = [], 0
        for field in self.fields:
            if field.parts:
                end = start + len(field.parts)
                values.append(field.kind._make(tuple(v) if type(v) is list else v for v in flat[start:end]))
                start = end
            else:
                value = flat[start]
                values.append(tuple(value) if type(value) is list and field.kind is not list[Tensor] else value)
                start += 1
        return self.inputs._make(values)

    def _run(self, *flat: Any) -> Any:
        x = self.nested(flat)
        if self._check is not None:
            self._check(x)
        device = x[0].device
        function = getattr(_backend.implementation(device, getattr(x, "backend", "")), self.name)
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):  # types are explicit here
                return _unpacked(function(x))
        return _unpacked(function(x))

    def _fake(self, *flat: Any) -> Any:
        return _unpacked(self.nested(flat).allocate())


def _unpacked(outputs: tuple[Any, ...]) -> Any:
    """As an operator returns them: one output stands alone."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _differentiable(operation: Operation, gradient: Operation) -> Callable[..., Any]:
    """Join an operation and its gradient, whose inputs are inputs and outputs of the operation by name."""
    places = {name: place for place, name in enumerate(_flat_names(operation))}
    wanted = [name for name in _flat_names(gradient) if name not in ("grad", "backend")]
    num_inputs, results = len(places), operation.outputs._fields
    places.update({name: num_inputs + place for place, name in enumerate(results)})
    sources = [places[name] for name in wanted]
    grads = [gradient.outputs._fields.index(f"grad_{name}") if f"grad_{name}" in gradient.outputs._fields else None
             for name in _flat_names(operation)]  # fmt: skip
    has_backend = "backend" in _flat_names(gradient)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            result = operation.operator(*flat)
            return result if isinstance(result, tuple) else (result,)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            values = [(*inputs, *output)[source] for source in sources]
            ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))
            ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in values]
            # Autograd runs backward in threads of its own, which know nothing of a context.
            ctx.backend = (_backend.current() if not torch.compiler.is_compiling() else "",) if has_backend else ()
            ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            flat = [next(saved) if item is None else item[0] for item in ctx.rest]
            result = gradient.operator(grad, *flat, *ctx.backend)
            result = result if isinstance(result, tuple) else (result,)
            return tuple(None if place is None else result[place] for place in grads)

    Function.__name__ = Function.__qualname__ = operation.name
    return Function.apply


def _flat_names(operation: Operation) -> Iterator[str]:
    return (part.name for field in operation.fields for part in field.parts or (field,))
