"""What the suite changes in Triton's interpreter when kernels run in it."""

import inspect
import warnings

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    """Silence numpy about lanes that are masked out, and patch the language once a launch instead of once a call.

    The interpreter replaces every function of ``triton.language`` before each call of a device function, ``tl.sum`` included,
    which takes most of the time of small kernels. Within a launch the replacement is still in place.
    """
    np.seterr(all="ignore")
    launch, patched = interpreter.GridExecutor.__call__, set()

    def launched(executor, *args, **kwargs):
        patched.clear()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # a tile of NaN has a minimum, which is NaN
                return launch(executor, *args, **kwargs)
        finally:
            patched.clear()

    def called(function, *args, **kwargs):
        values = function.fn.__globals__.values()
        modules = frozenset(id(value) for value in values if inspect.ismodule(value) and value in (tl, tl.core))
        if modules not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(modules)
        try:
            return function.rewrite()(*args, **kwargs)
        except interpreter.InterpreterError:
            raise
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called
