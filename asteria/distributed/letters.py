"""What ranks write to each other: a kind, a serial number, a note and tensors, in one buffer.

Format: the length of the note (8 bytes, little endian), the note (JSON, UTF-8), then the tensors'
bytes in order, each from a multiple of 64 on. A matrix that lies in memory column after column is
sent, and arrives, like that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Letter", "pack", "unpack"]

_ALIGNMENT = 64
_LENGTH_BYTES = 8
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64)}


@dataclass(frozen=True, slots=True)
class Letter:
    """One message, in host memory."""

    kind: str
    serial: int
    author: int
    """The rank that has written it, which may be another one than it comes from."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: numbers, texts, lists and dicts of them."""
    tensors: Sequence[Tensor | None] = ()
    """Of float32 or float64; unpacked ones are views of the buffer."""

    @property
    def tensor_bytes(self) -> int:
        """What it is about, without what it takes to say so."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


def pack(letter: Letter) -> Tensor:
    """The letter as (nbytes,) uint8 in host memory of its own. Any thread."""
    plans = [None if tensor is None else _plan(tensor) for tensor in letter.tensors]
    head = [letter.kind, letter.serial, letter.author, dict(letter.note), plans]
    written = json.dumps(head).encode()
    end = _aligned(_LENGTH_BYTES + len(written))
    offsets = []
    for tensor in letter.tensors:
        offsets.append(end)
        end += 0 if tensor is None else _aligned(tensor.numel() * tensor.element_size())
    buffer = torch.zeros(end, dtype=torch.uint8, device="cpu")
    front = len(written).to_bytes(_LENGTH_BYTES, "little") + written
    buffer[: len(front)] = torch.frombuffer(bytearray(front), dtype=torch.uint8)
    for offset, plan, tensor in zip(offsets, plans, letter.tensors, strict=True):
        if plan is not None and tensor is not None:
            _view(buffer, offset, plan).copy_(tensor)
    return buffer


def unpack(buffer: Tensor) -> Letter:
    """The letter in a buffer that `pack` has made. Any thread."""
    length = int.from_bytes(bytes(buffer[:_LENGTH_BYTES].tolist()), "little")
    front = _LENGTH_BYTES + length
    kind, serial, author, note, plans = json.loads(bytes(buffer[_LENGTH_BYTES:front].tolist()))
    tensors: list[Tensor | None] = []
    end = _aligned(front)
    for plan in plans:
        tensors.append(None if plan is None else _view(buffer, end, plan))
        if plan is not None:
            dtype, shape, _ = plan
            end += _aligned(math.prod(shape) * _DTYPES[dtype].itemsize)
    return Letter(kind, serial, author, note, tensors)


def _plan(tensor: Tensor) -> list[Any]:
    """[dtype, shape, whether by columns]."""
    by_columns = tensor.dim() >= 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), by_columns]


def _view(buffer: Tensor, offset: int, plan: list[Any]) -> Tensor:
    dtype, shape, by_columns = _DTYPES[plan[0]], plan[1], plan[2]
    nbytes = math.prod(shape) * dtype.itemsize
    flat = buffer[offset : offset + nbytes].view(dtype)
    if not by_columns:
        return flat.view(shape)
    return flat.view([*shape[:-2], shape[-1], shape[-2]]).mT


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
