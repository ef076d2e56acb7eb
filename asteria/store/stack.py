"""The state of same-shaped blocks, one tensor per field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FieldSpec", "Stack"]


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One named tensor of a block's state."""

    name: str
    shape: tuple[int, ...]
    """Of one block; a stack of b blocks holds (b, *shape)."""
    by_columns: bool = False
    """Whether a matrix lies in memory column after column, as LAPACK has them."""


class Stack:
    """Fields of ``blocks`` same-shaped blocks, each field one dense tensor (blocks, *shape).

    Neighbouring blocks are moved through batched products without a copy, and what the optimizer
    shows as a parameter's state are views of these tensors. Used by the training thread.
    """

    def __init__(
        self, fields: Iterable[FieldSpec], blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.fields: dict[str, Tensor] = {}
        for field in fields:
            tensor = torch.zeros(blocks, *field.shape, dtype=dtype, device=device)
            self.fields[field.name] = tensor.mT if field.by_columns else tensor

    def window(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """Views of the blocks ``start`` to ``stop``, by field name."""
        return {name: tensor[start:stop] for name, tensor in self.fields.items()}
