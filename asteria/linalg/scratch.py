"""Reused temporary memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Scratch", "cut"]

_Kind: TypeAlias = tuple[str, torch.dtype, torch.device]
_Shapes: TypeAlias = tuple[torch.Size, ...]

_MOST_CUTS = 16
"""Ways of cutting one view that are remembered."""


class Scratch:
    """Named buffers that are reused from step to step, each as large as its largest use.

    Fresh memory for every product costs page faults on the host and fragments the device. Views
    are remembered, too: making those of a model's gradients takes longer than copying them. Used
    by one thread, the training thread.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Kind, Tensor] = {}
        self._views: dict[_Kind, dict[tuple[int, ...], Tensor]] = {}
        self._parts: dict[int, dict[_Shapes, list[Tensor]]] = {}
        """What views were cut into, by their id, which is theirs as long as they are kept."""
        self.replaced = 0
        """How often memory was made or replaced by more: what was taken before may be outgrown."""

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
                for old in views.values():
                    del self._parts[id(old)]
                views.clear()
                self.replaced += 1
            view = views[shape] = buffer[:size].view(shape)
            self._parts[id(view)] = {}
        return view

    def cut(self, stacked: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """`cut` of the same name, which is remembered for a tensor that was taken here."""
        known = self._parts.get(id(stacked))
        if known is None:
            return cut(stacked, shapes)
        wanted = tuple(shapes)
        parts = known.get(wanted)
        if parts is None:
            if len(known) == _MOST_CUTS:
                known.clear()
            parts = known[wanted] = cut(stacked, wanted)
        return parts


def cut(stacked: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """``stacked`` (blocks, *dims), cut along the blocks into views of these shapes, in order.

    Each of them takes up whole blocks.
    """
    blocks, *dims = stacked.shape
    block = torch.Size(dims)
    if len(shapes) == blocks and all(shape == block for shape in shapes):
        return list(stacked.unbind())
    sizes = [shape.numel() // block.numel() for shape in shapes]
    parts = torch.split_with_sizes(stacked, sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
