"""Announcing finished gradients while the backward pass goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["GradientHooks"]


class GradientHooks:
    """Calls back whenever a watched parameter's gradient has been accumulated.

    That is at the end of each backward pass that reaches the parameter: once for a plain step,
    several times with accumulation, never for a frozen parameter or a gradient set by hand. So a
    call is a hint, and the callee must get along with any number of them. They come from
    the thread that runs the backward pass. The hooks end with this object, which keeps neither the
    callee nor the parameters alive.
    """

    def __init__(self, callee: Any, announce: Callable[[Any, Tensor], None]) -> None:
        """``announce(callee, parameter)`` is called as long as ``callee`` is alive."""
        self._callee = weakref.ref(callee)
        self._announce = announce
        self._handles: dict[int, RemovableHandle] = {}
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)

    def watch(self, parameter: Tensor) -> None:
        """Begin to announce the gradients of a leaf; does nothing for one without gradients."""
        if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._handles:
            callee, announce = self._callee, self._announce

            def hook(finished: Tensor) -> None:
                target = callee()
                if target is not None:
                    announce(target, finished)

            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles[id(parameter)] = handle

    def unwatch(self, parameter: Tensor) -> None:
        """Announce nothing of this parameter any more."""
        handle = self._handles.pop(id(parameter), None)
        if handle is not None:
            handle.remove()


def _remove_all(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
