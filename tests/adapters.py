"""What the tests of all adapters share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def what_stays(package: str) -> Iterator[list[str]]:
    """A growing list of what our adapter of a package says that it leaves to the package; whoever expects a line takes it."""
    from triton_yolo.integrations._stock import say_what_stays

    say_what_stays.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(package)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert not [line for line in lines if "keeps the computation" in line]


def pretend_two_ranks(monkeypatch: Any, others: float) -> None:
    """Let this process be one of two, where ``others`` is what the other one adds to every sum."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: x.add_(others))
