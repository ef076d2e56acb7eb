"""Operations that are written down first and then done in one go.

Every large product on the host drives Python's own code and data out of the caches, so that what
Python does between two of them takes several times as long as it would by itself: a tenth of the
step of a small model. Written down beforehand, the products follow each other directly; and what
was written down can be asked for again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

__all__ = ["Program", "do"]

_Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]


class _Open(threading.local):
    calls: list[_Call] | None = None
    """Where this thread writes down what it is asked to do; None does it."""


_open = _Open()


def do(operation: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Call ``operation``, at once or, within a `Program`, when that is run.

    Any thread. What it works on must not change until then but by operations before it.
    """
    if _open.calls is None:
        operation(*args, **kwargs)
    else:
        _open.calls.append((operation, args, kwargs))


class Program:
    """Operations of one thread, in the order in which `do` was asked for them.

    As a context it writes down what its thread does there: all of it or, if that raises, nothing.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._kept = 0

    def __enter__(self) -> None:
        self._kept = len(self._calls)
        _open.calls = self._calls

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        _open.calls = None
        if error is not None:
            del self._calls[self._kept :]

    def again(self) -> None:
        """`do` all that was written down, and keep it."""
        if _open.calls is None:
            _do_all(iter(self._calls))
        else:
            _open.calls += self._calls

    def run(self) -> None:
        """Do what was written down and forget it, also if something raises.

        KeyboardInterrupt, which comes between two operations, is raised after the last one.
        """
        _open.calls = None  # it may also have come when nothing more was to be written down
        calls = iter(self._calls)
        self._calls = []
        try:
            _do_all(calls)
        except KeyboardInterrupt:
            _do_all(calls)
            raise


def _do_all(calls: Iterator[_Call]) -> None:
    for operation, args, kwargs in calls:
        operation(*args, **kwargs)
