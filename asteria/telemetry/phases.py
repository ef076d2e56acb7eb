"""Names for what a step does, as `torch.profiler` shows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd.profiler import record_function

__all__ = ["phase"]

P = ParamSpec("P")
R = TypeVar("R")


def phase(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let calls of a function appear as ``asteria.{name}`` in the profiler, if it runs.

    In the thread that it was started in; else a call costs a look at whether it runs.
    """

    def named(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch._C._autograd._profiler_enabled():
                return function(*args, **kwargs)
            with record_function(f"asteria.{name}"):
                return function(*args, **kwargs)

        return called

    return named
