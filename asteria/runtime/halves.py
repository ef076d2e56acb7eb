"""Packed factors as people see them: full, unpacked when somebody looks at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asteria.linalg.packed import pack, unpack
from asteria.store.buffers import host_memory
from asteria.store.distant import Source

__all__ = ["UnpackedSource"]


class UnpackedSource:
    """The matrices that another source has the halves of, one after the other. Any thread."""

    def __init__(self, halves: Source, shape: Sequence[int]) -> None:
        """``halves`` are (b, r, 2 t + 1), as `pack` makes them; ``shape`` has b n n elements."""
        self._halves = halves
        self._shape = tuple(shape)
        self.lasts = halves.lasts

    def read(self) -> Tensor:
        """See `Source`."""
        half = self._halves.read()
        size = self._shape[-1]
        target = None
        if half.device.type == "cpu":
            nbytes = math.prod(self._shape) * half.element_size()
            target = host_memory(nbytes).view(half.dtype).view(len(half), size, size)
        return unpack(half, out=target).view(self._shape)

    def kept(self) -> UnpackedSource:
        """The same values, half of which are in memory from now on."""
        return UnpackedSource(_InMemory(self._halves.read()), self._shape)

    @property
    def is_in_memory(self) -> bool:
        """Whether there is nothing to be read."""
        return isinstance(self._halves, _InMemory)

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`; of what is symmetric half is kept."""
        size = value.shape[-1]
        matrices = value.reshape(-1, size, size)
        if not torch.equal(matrices, matrices.mT):
            return self._halves.replaced(value)
        half = pack(matrices)
        return UnpackedSource(self._halves.replaced(half) or _InMemory(half), value.shape)


class _InMemory:
    lasts = True

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def read(self) -> Tensor:
        """See `Source`."""
        return self._values

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return None
