"""How the state of same-shaped blocks lies in memory."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FieldSpec", "Layout", "Life"]

_ALIGNMENT = 64
"""Bytes: products may add in another order where memory lies differently in a cache line."""


class Life(enum.Enum):
    """What steps and refreshes do with a field; fields that live alike move between tiers together.

    In order of what it costs per byte to keep them away from the processor.
    """

    STEP = "step"
    """Read and written by every step: moments, eigenvalues."""
    BASIS = "basis"
    """Read by every step, written when a refresh is installed."""
    SUM = "sum"
    """Only added to by steps, read by refreshes: Kronecker factors."""


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One named tensor of a block's state."""

    name: str
    shape: tuple[int, ...]
    """Of one block; b blocks have (b, *shape)."""
    by_columns: bool = False
    """Whether a matrix lies in memory column after column, as LAPACK has them."""
    life: Life = Life.STEP
    narrow: torch.dtype | None = None
    """What it is stored in where the state is float32; None is that."""
    half_of: int | None = None
    """n, if it is half of a symmetric (n, n) matrix."""

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """Of one block, as people see it: of the matrix that it is half of, if it is."""
        return self.shape if self.half_of is None else (self.half_of, self.half_of)

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """What it is stored in beside a state of this dtype."""
        return self.narrow if self.narrow is not None and dtype == torch.float32 else dtype

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of one block beside a state of this dtype."""
        return math.prod(self.shape) * self.stored(dtype).itemsize


class Layout:
    """The fields of ``blocks`` same-shaped blocks in one piece of memory, each of them dense.

    A field is (blocks, *shape): neighbouring blocks go through batched products without a copy.
    ``dtype`` is that of the state, of which `FieldSpec.narrow` is an exception.
    """

    def __init__(self, fields: Iterable[FieldSpec], blocks: int, dtype: torch.dtype) -> None:
        self.fields = tuple(fields)
        self.blocks = blocks
        self.dtype = dtype
        self._offsets: list[int] = []
        end = 0
        for field in self.fields:
            self._offsets.append(end)
            size = blocks * field.nbytes(dtype)
            end += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end
        """Of the whole piece, gaps between fields included."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Of one field."""
        return next(field.stored(self.dtype) for field in self.fields if field.name == name)

    def field(self, name: str) -> FieldSpec:
        """One field."""
        return next(field for field in self.fields if field.name == name)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The fields that lie in ``memory``, (nbytes,) uint8, by name."""
        return {
            field.name: self._view(memory, field, offset)
            for field, offset in zip(self.fields, self._offsets, strict=True)
        }

    def _view(self, memory: Tensor, field: FieldSpec, offset: int) -> Tensor:
        shape = (self.blocks, *field.shape)
        size = self.blocks * field.nbytes(self.dtype)
        view = memory[offset : offset + size].view(field.stored(self.dtype)).view(shape)
        return view.mT if field.by_columns else view
