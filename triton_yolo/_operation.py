"""How an operation becomes an operator of PyTorch: everything follows from the fields of its inputs and outputs."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend
from ._precision import working

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
        kinds: dict[str, Any] = {}
        self._groups: list[tuple[int, int, Any]] = []  # first and last place, type of fields that are NamedTuples
        for field, kind in _kinds(inputs).items():
            parts = {field: kind} if kind in _SCHEMAS else _kinds(kind)
            if kind not in _SCHEMAS:
                self._groups.insert(0, (len(kinds), len(kinds) + len(parts), kind))
            kinds.update(parts)
        self.names, self.kinds = tuple(kinds), tuple(kinds.values())
        self._tuples = [place for place, kind in enumerate(kinds.values()) if get_origin(kind) is tuple]
        arguments = ", ".join(f"{_SCHEMAS[kind]} {field}" for field, kind in kinds.items())
        results = ", ".join(["Tensor"] * len(self.outputs._fields))
        _LIBRARY.define(f"{name}({arguments}) -> ({results})")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"triton_yolo::{name}", self._fake, lib=_LIBRARY)
        self.operator = getattr(torch.ops.triton_yolo, name).default
        self._check = check
        self._differentiable: _Differentiable | None = None
        if gradient is not None:
            self._differentiable = _with_gradient(self, gradient)
        elif any(field.startswith("grad_") for field in self.outputs._fields) and "grad" not in self.names:
            self._differentiable = _GradientsInside(self)

    def __call__(self, x: Any) -> Outputs:
        # Tangents of forward-mode differentiation travel without the grad mode too.
        if self._differentiable is None or not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            return self.outputs._make(self.run(x))
        return self._differentiable(x)

    def run(self, x: Any) -> tuple[Tensor, ...]:
        """Run without a gradient: what nobody watches without the operator, which costs as much as ten launches."""
        is_watched = _is_traced() or _is_watched(x[0])
        return self.run_operator(self.flat(x)) if is_watched else self.compute(x)

    def run_operator(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        result = self.operator(*flat)
        return result if isinstance(result, tuple) else (result,)

    def flat(self, x: Any) -> list[Any]:
        """The inputs as the operator takes them: fields that are NamedTuples one by one."""
        result = list(x)
        shift = 0
        for start, end, _ in reversed(self._groups):
            place = start - shift
            result[start : start + 1] = x[place]
            shift += end - start - 1
        return result

    def nested(self, flat: Sequence[Any]) -> Any:
        """The opposite of ``flat``; the operator hands tuples over as lists."""
        values = list(flat)
        for place in self._tuples:
            values[place] = tuple(values[place])
        for start, end, kind in self._groups:
            values[start:end] = (kind._make(values[start:end]),)
        return self.inputs._make(values)

    def compute(self, x: Any, module: Any = None) -> tuple[Tensor, ...]:
        """Run the implementation in ``module``, that of the backend if none is given."""
        if self._check is not None:
            self._check(x)
        device = x[0].device
        function = getattr(module or _backend.implementation(device, getattr(x, "backend", "")), self.name)
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(device.type, enabled=False):  # types are explicit here
                return function(x)
        return function(x)

    def _run(self, *flat: Any) -> Any:
        return _unpacked(self.compute(self.nested(flat)))

    def _fake(self, *flat: Any) -> Any:
        return _unpacked(self.nested(flat).allocate())


def _unpacked(outputs: tuple[Any, ...]) -> Any:
    """As an operator returns them: one output stands alone."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _is_traced() -> bool:
    """Whether this is for a graph or for ``torch.func``, which want functions without a state."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _is_watched(x: Tensor) -> bool:
    """Whether a mode, a subclass or a profiler wants to see which operators run."""
    return type(x) is not Tensor or torch.autograd.profiler._is_profiler_enabled or torch._C._len_torch_dispatch_stack() > 0


def _kinds(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in kind._fields}


class _Differentiable:
    """An operation as autograd sees it.

    Args:
        operation: what runs forward.
        remember: called with a context, the flat inputs and the outputs.
        give_back: called with that context and the gradient of the first output, returns those of the flat inputs.
    """

    def __init__(
        self, operation: "Operation", remember: Callable[..., None], give_back: Callable[..., tuple[Tensor | None, ...]]
    ) -> None:
        self._operation = operation

        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(operation.names)
            with torch.no_grad():
                grads = give_back(ctx, grad)
            return _differentiated_once(grads, grad, *ctx.saved_tensors)

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
                output = operation.run(operation.nested(flat))
                remember(ctx, flat, output)
                return output

        class Functional(torch.autograd.Function):
            """For ``torch.func``, at the price of a slower call."""

            @staticmethod
            def forward(*flat: Any) -> tuple[Tensor, ...]:
                return operation.run(operation.nested(flat))

            setup_context = staticmethod(remember)

        for function in (Plain, Functional):
            function.__name__ = function.__qualname__ = operation.name
            function.backward = staticmethod(backward)  # type: ignore[method-assign]
        self._plain, self._functional = Plain, Functional

        def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            remember(ctx, inputs, output if isinstance(output, tuple) else (output,))
            ctx.lengths = [len(inputs[place]) if kind == list[Tensor] else None for place, kind in enumerate(operation.kinds)]

        def give_back_lists(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
            grads = backward(ctx, grad)
            return tuple([x if n is None else [None] * n for x, n in zip(grads, ctx.lengths, strict=True)])

        # Graphs have the operator, with the same gradient.
        name = f"triton_yolo::{operation.name}"
        torch.library.register_autograd(name, give_back_lists, setup_context=set_up, lib=_LIBRARY)

    def __call__(self, x: Any) -> Any:
        flat = self._operation.flat(x)
        if torch.compiler.is_compiling():
            return self._operation.outputs._make(self._operation.run_operator(flat))
        function = self._functional if torch._C._are_functorch_transforms_active() else self._plain
        return self._operation.outputs._make(function.apply(*flat))


class _Once(torch.autograd.Function):
    """Gradients by which nothing can be differentiated again: an error in place of a derivative of 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple([None if x is None else x.view_as(x) for x in tensors[:count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("the gradients of triton_yolo's operations can't be differentiated again (double backward)")


def _differentiated_once(grads: Sequence[Tensor | None], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same gradients, in the graph of what they depend on if there is one (``create_graph=True``)."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(grads)
    return _Once.apply(len(grads), *grads, *sources)


def _only_first_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the others it would make zeros


def _with_gradient(operation: "Operation", gradient: "Operation") -> _Differentiable:
    """Join an operation and its gradient, which takes inputs and outputs of the operation by their names."""
    known = [*operation.names, *operation.outputs._fields]
    sources = [known.index(name) for name in gradient.names if name not in ("grad", "backend")]
    grads = [f"grad_{name}" for name in operation.names]
    places = [gradient.outputs._fields.index(name) if name in gradient.outputs._fields else None for name in grads]

    def remember(ctx: Any, flat: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values = [(*flat, *output)[source] for source in sources]
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in values])
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        # Autograd runs backward in threads of its own, which know nothing of a context.
        ctx.backend = "" if torch.compiler.is_compiling() else _backend.current()
        _only_first_has_gradient(ctx, output)

    def give_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        result = gradient.run(gradient.nested([grad, *values, ctx.backend]))
        return tuple([None if place is None else result[place] for place in places])

    return _Differentiable(operation, remember, give_back)


class _GradientsInside(_Differentiable):
    """An operation that puts out the gradients of its inputs, to be multiplied by that of its first output.

    That happens in place, which is nothing to do where it is 1; graphs and ``torch.func`` multiply.
    """

    def __init__(self, operation: "Operation") -> None:
        names = operation.outputs._fields
        first = min(place for place, name in enumerate(names) if name.startswith("grad_"))
        wanted = [name.removeprefix("grad_") for name in names[first:]]
        places = [operation.names.index(name) for name in wanted]
        kinds = list(get_type_hints(operation.inputs).values())
        with_tensors = (Tensor, Tensor | None, list[Tensor])
        places_of_others = [place for place in range(len(wanted), len(kinds)) if kinds[place] in with_tensors]

        def remember(ctx: Any, flat: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*output[first:], *[flat[place] for place in places])
            _only_first_has_gradient(ctx, output)

        def give_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            result: list[Tensor | None] = [None] * len(operation.names)
            for place, x in zip(places, ctx.saved_tensors, strict=False):  # the inputs follow
                result[place] = (working(x) * grad).to(x.dtype)
            return tuple(result)

        super().__init__(operation, remember, give_back)

        def grads_of(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # of a graph that was retained: they went to who asked first, and are computed again
                x = operation.inputs._make((*ctx.saved_tensors, *ctx.rest))
                if _versions(x, places_of_others) != ctx.versions:
                    raise RuntimeError(
                        "targets or settings of triton_yolo were modified by an inplace operation before a second backward"
                    )
                _backend.begin(ctx.backend)
                try:
                    grads = operation.run(x)[first:]
                finally:
                    _backend.end()
            if type(grad) is Tensor:
                module = ctx.module or _backend.implementation(grad.device, ctx.backend)
                module.scale_(grads, grad)
            else:
                for x in grads:
                    x.mul_(grad)
            return grads

        class InPlace(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any, others: list[Tensor], *leaves: Tensor) -> Tensor:
                ctx.backend = _backend.current()
                if _is_watched(x[0]):
                    module, output = None, operation.run_operator(operation.flat(x))
                else:
                    module = _backend.implementation(x[0].device, ctx.backend)
                    output = operation.compute(x, module)
                ctx.module = module
                ctx.save_for_backward(*leaves)
                ctx.set_materialize_grads(False)
                ctx.rest, ctx.versions = x[len(leaves) :], _versions(x, places_of_others)
                ctx.grads = output[first:]
                others += output[1:first]  # autograd need not know of what has no gradient
                return output[0]

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
                if grad is None:
                    return (None,) * (2 + len(wanted))
                if torch.is_grad_enabled():  # create_graph=True
                    with torch.no_grad():
                        grads = grads_of(ctx, grad)
                    return (None, None, *_differentiated_once(grads, grad, *ctx.saved_tensors))
                return (None, None, *grads_of(ctx, grad))

        InPlace.__name__ = InPlace.__qualname__ = operation.name
        # Past the method of ``Function``, which serves ``torch.func``.
        self._in_place, self._num_leaves = super(torch.autograd.Function, InPlace).apply, len(wanted)
        self._kept = (None,) * (len(names) - first)  # gradients are nobody's business
        assert list(operation.inputs._fields[: len(wanted)]) == wanted, "what has a gradient comes first"

    def __call__(self, x: Any) -> Any:
        if _is_traced():
            return super().__call__(x)
        others: list[Tensor] = []
        loss = self._in_place(x, others, *x[: self._num_leaves])
        return tuple.__new__(self._operation.outputs, (loss, *others, *self._kept))


def _versions(x: Any, places: Sequence[int]) -> list[int]:
    """How often the tensors at these places were changed. One that was made in inference mode has no count."""
    versions = []
    for place in places:
        for tensor in x[place] if isinstance(x[place], list) else (x[place],):
            versions.append(0 if tensor is None or tensor.is_inference() else tensor._version)
    return versions
