"""Reused temporary memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Named buffers that are reused from step to step, each as large as its largest use.

    Fresh memory for every product costs page faults on the host and fragments the device. Used
    by one thread, the training thread.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device], dict[tuple[int, ...], Tensor]] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An uninitialized tensor; it is valid until the same name is taken again."""
        key = (name, dtype, device)
        views = self._views.setdefault(key, {})
        view = views.get(shape)
        if view is None:
            size = math.prod(shape)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=device)
                self._buffers[key] = buffer
                views.clear()
            view = views[shape] = buffer[:size].view(shape)
        return view
