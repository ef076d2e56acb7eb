"""Refreshes of factors that are kept in their own eigenbasis.

Shapes: Q (b, n, n) orthogonal eigenbases; B = Q^T L Q (b, n, n), what is kept of the factor L.

B is all that LDLR needs of L, and takes in a gradient that has been projected for Adam anyway:
Q^T (G G^T) Q = (Q^T G) (Q^T G)^T. So L Q and Q^T (L Q) need not be computed, and rounding is
relative to an entry's own row and column: TF32 leaves the leading digits of a small eigenvalue,
where it would leave nothing of it in L. Errors are forgotten with the moving average.

A new basis Q' is found from B and Q (`rotated_ldlr`, `rotated_eigh`). Where it takes the place of
the one in use, be that Q or a later one, B follows by the `turn` between these two (`conjugated`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, eigh_basis, is_orthogonal, permuted
from asteria.linalg.ldlr import elimination, orthonormalized
from asteria.linalg.precision import exact_bmm

__all__ = ["conjugated", "in_basis", "out_of_basis", "rotated_eigh", "rotated_ldlr", "turn"]


def rotated_ldlr(rotated: Tensor, basis: Tensor, *, sort: bool, iterations: int = 1) -> BasisResult:
    """Refresh Q by LDLR; ``sort``, ``iterations`` and where columns stand as in `ldlr`.

    Shapes: rotated (b, n, n), basis (b, n, n). Allocates, never mutates; any thread; no
    synchronization with the device. All products but that before the Cholesky factorization may be
    rounded, and the basis stays orthogonal.
    """
    if not sort:
        correction = elimination(rotated, iterations)
        return _checked(orthonormalized(basis.mT.contiguous(), correction).mT, rotated)
    order = _by_diagonal(rotated)
    correction = elimination(_both_permuted(rotated, order), iterations)
    rows = orthonormalized(permuted(basis.mT.contiguous(), order), correction)
    return _checked(permuted(rows, order.argsort(-1)).mT, rotated)


def rotated_eigh(rotated: Tensor, basis: Tensor) -> BasisResult:
    """Refresh Q by eigenvectors of B, matched to the columns by rank; in float64.

    Shapes as in `rotated_ldlr`. Allocates, never mutates; any thread; waits for the device.
    """
    vectors, usable = eigh_basis(rotated)
    found = permuted(vectors.mT.contiguous(), _by_diagonal(rotated).argsort(-1)).mT
    # Signs that turn as little as can be.
    signs = found.diagonal(dim1=-2, dim2=-1).sign()
    change = found * torch.where(signs == 0, 1, signs).unsqueeze(-2)
    change.diagonal(dim1=-2, dim2=-1).sub_(1)
    fresh = (basis + exact_bmm(basis, change)).mT.contiguous().mT
    result = _checked(fresh, rotated)
    return BasisResult(result.basis, result.usable & usable)


def turn(old: Tensor, new: Tensor) -> Tensor:
    """U = Q^-1 Q' (b, n, n): what is given in Q becomes U^T times itself in Q'.

    Not rounded: a digit of U that is lost is a part of the largest eigenvalue in every other. Of
    what Q lacks of being orthogonal only the product with Q' - Q gets into it.
    Allocates, never mutates; any thread; no synchronization.
    """
    by = exact_bmm(old.mT, new - old)
    by.diagonal(dim1=-2, dim2=-1).add_(1)
    return by


def conjugated(rotated: Tensor, by: Tensor) -> Tensor:
    """B' = U^T B U of U = ``by``: B and a correction, which is all that may be rounded.

    Shapes: (b, n, n) each. Allocates, never mutates; any thread; no synchronization.
    """
    change = by.clone()
    change.diagonal(dim1=-2, dim2=-1).sub_(1)
    right = torch.baddbmm(rotated, rotated, change)
    product = torch.baddbmm(right, change.mT, right)
    del change, right  # three matrices at a time
    return (product + product.mT).mul_(0.5)


def in_basis(factor: Tensor, basis: Tensor) -> Tensor:
    """B of L; shapes (b, n, n) each. Allocates, never mutates; any thread; not rounded."""
    product = exact_bmm(exact_bmm(basis.mT, factor), basis)
    return (product + product.mT).mul_(0.5)


def out_of_basis(rotated: Tensor, basis: Tensor) -> Tensor:
    """L of B; as `in_basis`."""
    return in_basis(rotated, basis.mT)


def _by_diagonal(rotated: Tensor) -> Tensor:
    """Columns by decreasing Rayleigh quotient."""
    return rotated.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def _both_permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in this order."""
    by_rows = permuted(matrix.contiguous(), order)
    return permuted(by_rows.mT.contiguous(), order).mT


def _checked(basis: Tensor, rotated: Tensor) -> BasisResult:
    usable = is_orthogonal(basis) & torch.isfinite(rotated).all(-1).all(-1)
    return BasisResult(basis, usable)
