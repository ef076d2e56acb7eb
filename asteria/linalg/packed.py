"""Symmetric matrices in half of their elements, without an index.

Shapes: A (..., n, n) symmetric, t = n // 2, r = n - t. Its half H (..., r, 2 t + 1) is a matrix of
n (n + 1) / 2 elements: what is below the diagonal of A, folded. With square blocks

    A = [ T  S^T ]     H = [ S | P ]     P[i, j] = B[i, j]      for j <= i
        [ S  B   ]                       P[i, j] = T[j - 1, i]  for j > i

for S (r, t), T (t, t), B (r, r), P (r, t + 1): two triangles that fit together.
Source: Gustavson et al., Rectangular full packed format for Cholesky's algorithm, TOMS 37(2), 2010.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decay_half_", "fold_bytes", "pack", "packed_shape", "size_of", "unpack", "unpacked"]

_SCRATCH_BYTES = 32 * 1024**2
"""Of what a fold computes at a time, or that of a single matrix where it is larger."""


def packed_shape(size: int) -> tuple[int, int]:
    """The shape of half a symmetric matrix of ``size`` rows: n (n + 1) / 2 elements."""
    return size - size // 2, 2 * (size // 2) + 1


def size_of(shape: Sequence[int]) -> int:
    """n of a matrix (..., n, n), or of a half of one; a shape is either the one or the other."""
    rows, columns = shape[-2:]
    return rows if rows == columns else rows + columns // 2


def pack(matrix: Tensor) -> Tensor:
    """Half of symmetric matrices: of others what is on and below the diagonal.

    Shapes: (..., n, n) -> (..., r, 2 t + 1); any dtype, any device, meta too. Allocates, never
    mutates; any thread.
    """
    size = matrix.shape[-1]
    top = size // 2
    half = matrix.new_empty(*matrix.shape[:-2], *packed_shape(size))
    off, lower, upper = _parts(half)
    off.copy_(matrix[..., top:, :top])
    lower.copy_(matrix[..., top:, top:])
    upper.copy_(torch.where(_on_or_above(upper), matrix[..., :top, :top].mT, upper))
    return half


def unpack(half: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The symmetric matrices of which `pack` has made ``half``, bit for bit.

    Shapes: (..., r, 2 t + 1) -> (..., n, n), in ``out`` if there is one, which may be of any
    strides. Any dtype, any device, meta too; any thread.
    """
    size = size_of(half.shape)
    top = size // 2
    matrix = half.new_empty(*half.shape[:-2], size, size) if out is None else out
    off, lower, upper = _parts(half)
    matrix[..., top:, :top] = off
    matrix[..., :top, top:] = off.mT
    torch.where(_on_or_above(upper), upper, upper.mT, out=matrix[..., :top, :top])
    torch.where(_on_or_above(lower), lower.mT, lower, out=matrix[..., top:, top:])
    return matrix


def unpacked(factor: Tensor) -> Tensor:
    """``factor`` (..., n, n) itself, or the matrices that it is half of, in memory of their own."""
    return factor if factor.shape[-1] == factor.shape[-2] else unpack(factor)


def decay_half_(
    half: Tensor, rows: Tensor, *, beta: float, weight: float, gate: Tensor | None
) -> None:
    """The half of A becomes that of beta A + weight X X^T, in place.

    Shapes: half (b, r, 2 t + 1), rows X (b, n, k), gate as in `decay_gram_`. The products are those
    of T, S and B: three quarters of the work for a full matrix, in half of its memory at a time.
    How many blocks go together depends on shapes only. No synchronization with the device.
    """
    step = _blocks_at_a_time(rows.shape[-2], half.element_size())
    kept: float | Tensor = beta
    added: float | Tensor = weight
    if gate is not None:  # 1 and 0 where the gate is closed; exact where it is open
        kept, added = gate * beta + (1 - gate), gate * weight
    for start in range(0, len(half), step):
        blocks = slice(start, start + step)
        _decay_parts_(half[blocks], rows[blocks], kept, added)


def fold_bytes(size: int, blocks: int, itemsize: int) -> int:
    """Temporary memory of `decay_half_` for so many matrices of ``size`` rows."""
    together = min(blocks, _blocks_at_a_time(size, itemsize))
    return together * _product_bytes(size, itemsize)


def _blocks_at_a_time(size: int, itemsize: int) -> int:
    return max(1, _SCRATCH_BYTES // _product_bytes(size, itemsize))


def _product_bytes(size: int, itemsize: int) -> int:
    """Of S and B."""
    return (size - size // 2) * size * itemsize


def _decay_parts_(half: Tensor, rows: Tensor, kept: float | Tensor, added: float | Tensor) -> None:
    size = rows.shape[-2]
    top = size // 2
    first, (*_, upper) = rows[:, :top], _parts(half)
    half.mul_(kept)
    # S and B, then T; what is zeroed belongs to the other triangle.
    _add_(half[..., :size], torch.bmm(rows[:, top:], rows.mT).tril_(top), added)
    _add_(upper, torch.bmm(first, first.mT).triu_(), added)


def _add_(target: Tensor, product: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        target.add_(product.mul_(factor))
    else:
        target.add_(product, alpha=factor)


def _parts(half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views: S (..., r, t), (..., r, r) with B on and below its diagonal, (..., t, t) with T above.

    The latter two overlap, and have the other's elements in the triangle that is not theirs.
    """
    bottom = half.shape[-2]
    top = half.shape[-1] // 2
    both = half[..., top:]
    return half[..., :top], both[..., :bottom], both[..., :top, 1:]


def _on_or_above(square: Tensor) -> Tensor:
    """(n, n) bool, true on and above the diagonal."""
    index = torch.arange(square.shape[-1], device=square.device)
    return index.unsqueeze(-1) <= index
