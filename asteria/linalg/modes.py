"""Products along the modes of stacked tensors.

Shapes: b blocks in a stack, each of rank r with dims (d_0, ..., d_{r-1}).
A matrix of mode k is (b, d_k, d_k). X_(k) is the unfolding (b, d_k, product of the other dims).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asteria.linalg.deferred import do
from asteria.linalg.packed import decay_half_

__all__ = ["change_basis_", "decay_gram_", "replace_", "scale_modes_", "transform"]


def transform(
    x: Tensor,
    matrices: Sequence[Tensor | None],
    scratch: tuple[Tensor, Tensor],
    *,
    transpose: bool,
) -> Tensor:
    """Multiply every mode k of ``x`` by ``matrices[k]`` (or its transpose); None leaves the mode.

    With eigenbases, ``transpose=True`` projects into them and ``transpose=False`` projects back.
    Shapes: x (b, d_0, ...), matrices[k] (b, d_k, d_k), scratch two tensors like x; any dtype, any
    device. The result lies in one of the scratch tensors, or is ``x`` itself if all are None;
    ``x`` may be one of the scratch tensors, which is then overwritten.
    """
    for mode, matrix in enumerate(matrices):
        if matrix is None:
            continue
        target = scratch[1] if x is scratch[0] else scratch[0]
        if x.dim() != 3:
            _multiply_mode(x, matrix.mT if transpose else matrix, mode, target)
        elif mode == 0:
            do(torch.bmm, matrix.mT if transpose else matrix, x, out=target)
        else:
            do(torch.bmm, x, matrix if transpose else matrix.mT, out=target)
        x = target
    return x


def change_basis_(
    x: Tensor,
    old: Sequence[Tensor | None],
    new: Sequence[Tensor | None],
    scratch: tuple[Tensor, Tensor],
    gate: Tensor | None,
) -> None:
    """``x``, given in the bases ``old``, is written in the bases ``new``, in place.

    Shapes as in `transform`, ``gate`` as in `decay_gram_`. The way through the original space takes
    4 (m n^2 + m^2 n) flop for a matrix: no more than with the product of the bases, and less where
    m and n differ.
    """
    original = transform(x, old, scratch, transpose=False)
    replace_(x, transform(original, new, scratch, transpose=True), gate)


def replace_(target: Tensor, value: Tensor, gate: Tensor | None) -> None:
    """``target`` <- ``value``, unless ``gate`` is 0."""
    target.copy_(value if gate is None else torch.where(gate > 0, value, target))


def _multiply_mode(x: Tensor, matrix: Tensor, mode: int, out: Tensor) -> None:
    """``out`` = ``matrix`` (b, d_k, d_k) times mode k of ``x``; both contiguous and distinct."""
    blocks, dims = x.shape[0], x.shape[1:]
    size, before = dims[mode], math.prod(dims[:mode])
    if before == 1:
        torch.bmm(matrix, x.view(blocks, size, -1), out=out.view(blocks, size, -1))
    elif mode == len(dims) - 1:
        torch.bmm(x.view(blocks, -1, size), matrix.mT, out=out.view(blocks, -1, size))
    else:
        # An inner mode (convolutions) needs one transposing copy each way.
        split = x.view(blocks, before, size, -1).transpose(1, 2).reshape(blocks, size, -1)
        product = torch.bmm(matrix, split).view(blocks, size, before, -1)
        out.view(blocks, before, size, -1).copy_(product.transpose(1, 2))


def decay_gram_(
    factor: Tensor, x: Tensor, mode: int, *, beta: float, weight: float, gate: Tensor | None
) -> None:
    """``factor`` <- beta * factor + weight * X_(k) X_(k)^T, in place.

    Shapes: factor (b, d_k, d_k), or the half of it that `pack` makes; x (b, d_0, ...). ``gate`` is
    None or a scalar tensor that is 1, or 0 to leave the factor as it is without the host knowing.
    """
    left = _unfolded(x, mode)
    if factor.shape[-2] != factor.shape[-1]:
        decay_half_(factor, left, beta=beta, weight=weight, gate=gate)
    elif gate is None:
        do(factor.baddbmm_, left, left.mT, beta=beta, alpha=weight)
    else:
        change = torch.bmm(left, left.mT).mul_(weight).add_(factor, alpha=beta - 1)
        factor.addcmul_(change, gate)


def _unfolded(x: Tensor, mode: int) -> Tensor:
    """X_(k), (b, d_k, product of the other dims): a view, but for inner modes."""
    if x.dim() == 3:
        return x.mT if mode else x
    blocks, dims = x.shape[0], x.shape[1:]
    size, before = dims[mode], math.prod(dims[:mode])
    if before == 1:
        return x.view(blocks, size, -1)
    if mode == len(dims) - 1:
        return x.view(blocks, -1, size).mT
    return x.view(blocks, before, size, -1).transpose(1, 2).reshape(blocks, size, -1)


def scale_modes_(x: Tensor, scales: Sequence[Tensor | None]) -> Tensor:
    """Multiply ``x`` in place by ``scales[k]`` (b, d_k) along every mode k that has one."""
    rank = x.dim() - 1
    for mode, scale in enumerate(scales):
        if scale is not None:
            shape = [1] * rank
            shape[mode] = scale.shape[1]
            x.mul_(scale.view(scale.shape[0], *shape))
    return x
