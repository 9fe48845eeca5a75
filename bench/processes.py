"""How a process of a benchmark ended."""

import signal
from typing import IO


def ending(status: int, errors: IO[bytes], num_lines: int) -> str:
    """The exit status or signal, and the last lines that it wrote to its stderr, which is a file."""
    how = f"ended with {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return ": ".join([how, *(["\n".join(lines[-num_lines:])] if lines else [])])
