"""Refreshes of factors that are kept in their own eigenbasis.

Shapes: Q (b, n, n) orthogonal eigenbases; B = Q^T L Q (b, n, n), what is kept of the factor L.

B is all that LDLR needs of L, and takes in a gradient that has been projected for Adam anyway:
Q^T (G G^T) Q = (Q^T G) (Q^T G)^T. So L Q and Q^T (L Q) need not be computed, and rounding is
relative to an entry's own row and column: TF32 leaves the leading digits of a small eigenvalue,
where it would leave nothing of it in L. Errors are forgotten with the moving average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import eigh_basis, is_orthogonal, permuted
from asteria.linalg.ldlr import elimination
from asteria.linalg.precision import exact_bmm

__all__ = ["Turned", "exactly_turned", "turned"]


class Turned(NamedTuple):
    """Eigenbases and factors after a refresh, and what it has turned."""

    basis: Tensor
    """(b, n, n), Q'."""
    rotated: Tensor
    """(b, n, n), B' = Q'^T L Q'."""
    turn: Tensor
    """(b, n, n), U with Q' = Q U: what is given by Q becomes U^T times itself."""
    usable: Tensor
    """(b,) bool on the basis' device: finite and orthogonal."""


def turned(rotated: Tensor, basis: Tensor, *, sort: bool, iterations: int = 1) -> Turned:
    """Refresh Q and B by LDLR; ``sort``, ``iterations`` and where columns stand as in `ldlr`.

    Shapes: rotated (b, n, n), basis (b, n, n). Allocates, never mutates; any thread; no
    synchronization with the device. All products but that before the Cholesky factorization may be
    rounded, and the basis stays orthogonal.
    """
    if sort:
        order = rotated.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        back = order.argsort(-1)
        rotated = _both_permuted(rotated, order)
        rows = permuted(basis.mT.contiguous(), order)
    else:
        back, rows = None, basis.mT.contiguous()
    correction = elimination(rotated, iterations)
    leaning = torch.baddbmm(rows, correction.mT, rows)
    triangle = torch.linalg.cholesky_ex(exact_bmm(leaning, leaning.mT)).L.mT
    # U - I = (M - R) R^-1, without the digits that U and I have in common; Q' = (Q M) R^-1.
    difference = correction - triangle
    difference.diagonal(dim1=-2, dim2=-1).add_(1)
    both = torch.cat([leaning.mT, difference], dim=-2)
    both = torch.linalg.solve_triangular(triangle, both, upper=True, left=False)
    columns, change = both.split(rows.shape[-1], dim=-2)
    fresh = _conjugated(rotated, change)
    if back is not None:
        columns, change = permuted(columns.mT.contiguous(), back).mT, _both_permuted(change, back)
        fresh = _both_permuted(fresh, back)
    return _checked(columns.mT.contiguous().mT, fresh, change)


def exactly_turned(rotated: Tensor, basis: Tensor) -> Turned:
    """Refresh Q and B by eigenvectors of B, matched to the columns by rank; in float64.

    Shapes as in `turned`. Allocates, never mutates; any thread; waits for the device.
    """
    vectors, usable = eigh_basis(rotated)
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    back = diagonal.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    turn = permuted(vectors.mT.contiguous(), back).mT
    # Signs that turn as little as can be.
    signs = turn.diagonal(dim1=-2, dim2=-1).sign()
    change = turn * torch.where(signs == 0, 1, signs).unsqueeze(-2)
    change.diagonal(dim1=-2, dim2=-1).sub_(1)
    found = _checked(basis + exact_bmm(basis, change), _conjugated(rotated, change), change)
    return found._replace(usable=found.usable & usable)


def _conjugated(rotated: Tensor, change: Tensor) -> Tensor:
    """U^T B U of U = I + ``change``: B and a correction, which is all that is rounded."""
    right = torch.baddbmm(rotated, rotated, change)
    product = torch.baddbmm(right, change.mT, right)
    return (product + product.mT).mul_(0.5)


def _both_permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in this order."""
    by_rows = permuted(matrix.contiguous(), order)
    return permuted(by_rows.mT.contiguous(), order).mT


def _checked(basis: Tensor, rotated: Tensor, change: Tensor) -> Turned:
    turn = change.clone()
    turn.diagonal(dim1=-2, dim2=-1).add_(1)
    usable = is_orthogonal(basis) & torch.isfinite(rotated).all(-1).all(-1)
    return Turned(basis, rotated, turn, usable)
