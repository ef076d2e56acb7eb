"""One orthogonal iteration from products, Cholesky factorizations and a triangular solve.

Shapes: L (b, n, n) symmetric positive semidefinite factors, Q (b, n, n) orthogonal eigenbases,
B = Q^T L Q.

With B = M D M^T, M unit lower triangular, L Q = Q B = (Q M) (D M^T). D M^T is upper triangular, so
that the Q of qr(L Q) is that of qr(Q M); and where L Q is as ill-conditioned as L, M is not, if
the columns stand by decreasing eigenvalue. A Cholesky factorization (Q M)^T (Q M) = R^T R gives it:
Q M R^-1. What Q has lost of its orthogonality is in R, and repaired.
Source: the step is Rutishauser's (1958), Cholesky LR; B becomes R D R^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, by_quotient, is_orthogonal, permuted
from asteria.linalg.precision import exact_bmm

__all__ = ["elimination", "ldlr", "orthonormalized"]

_LARGEST = 4.0
"""Largest entry of M in use: where eigenvalues drown in rounding they are much larger, and so is
the condition of M, whose square is that of what comes next.
"""
_NEAR = 0.25
"""Root mean square sum of a column of M - I, below which two iterations are like two steps."""


def ldlr(factor: Tensor, basis: Tensor, *, sort: bool, iterations: int = 1) -> BasisResult:
    """Orthogonal iteration, Q <- qr(L Q), without a QR factorization.

    ``iterations`` is how many of them it is worth, at the price of one: with 1 it is
    `orthogonal_iteration` but for the columns' signs and for rounding, with k the part of column i
    in column j is multiplied by 1 + r + ... + r^(k-1), r the ratio of their eigenvalues, which is
    k iterations to first order; far from the eigenbasis it is one. ``sort`` and where columns stand
    as in `orthogonal_iteration`.

    Shapes: factor (b, n, n), basis (b, n, n) -> basis (b, n, n). Allocates, never mutates; any
    thread; no synchronization with the device: a block for which there is no factorization takes a
    smaller step, and one whose factor or result is no good is marked as not usable.
    """
    rows = basis.mT.contiguous()
    images = exact_bmm(rows, factor)
    if not sort:
        return _checked(orthonormalized(rows, elimination(exact_bmm(images, rows.mT), iterations)))
    order = by_quotient(images * rows)
    images, rows = permuted(images, order), permuted(rows, order)
    fresh = orthonormalized(rows, elimination(exact_bmm(images, rows.mT), iterations))
    return _checked(permuted(fresh, order.argsort(-1)))


def _checked(rows: Tensor) -> BasisResult:
    return BasisResult(rows.mT, is_orthogonal(rows.mT))


def elimination(rotated: Tensor, iterations: int = 1) -> Tensor:
    """M - I (b, n, n), of B = ``rotated`` (b, n, n) = M D M^T; or as much of it as can be had.

    Where rounding has left B indefinite, a multiple of the identity is added that is above the
    rounding: eigenvalues below it are then left where they are. Where that does not do, a skew
    first-order step takes the place of M - I, which cannot fail: (I + X)^T (I + X) = I + X^T X.
    ``iterations`` as in `ldlr`. Allocates, never mutates; any thread; no synchronization.
    """
    size, limits = rotated.shape[-1], torch.finfo(rotated.dtype)
    spectrum = rotated.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    top = spectrum.amax(-1, keepdim=True).clamp_min(limits.tiny)
    shifted = rotated.clone()
    found, fits = _strict_triangle(shifted, top * (limits.eps / 8))
    # The host knows at once whether more is needed; a device is not waited for.
    if not (rotated.is_cpu and bool(fits.all())):
        rescued, saved = _strict_triangle(shifted, top * (size * limits.eps))
        rescued = torch.where(saved[:, None, None], rescued, _skew_step(rotated, spectrum, top))
        found = torch.where(fits[:, None, None], found, rescued)
    if iterations == 1:
        return found
    near = found.square().sum((-2, -1)) <= size * _NEAR**2
    weighted = found * _geometric_sums(spectrum / top + limits.eps, iterations)
    return torch.where(near[:, None, None], weighted, found)


def _strict_triangle(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """M - I of ``matrix`` + ``shift`` I = M D M^T, and whether it exists and is moderate, (b,).

    Shapes: (b, n, n), which keeps the shift, and (b, 1).
    """
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift)
    triangle, info = torch.linalg.cholesky_ex(matrix)
    unit = triangle.div_(triangle.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).clone()).tril_(-1)
    largest = torch.linalg.vector_norm(unit, float("inf"), dim=(-2, -1))
    return unit, (info == 0) & (largest <= _LARGEST)


def _skew_step(rotated: Tensor, spectrum: Tensor, top: Tensor) -> Tensor:
    """X_ij = B_ij / max(B_ii, B_jj), at most 1, negative where column j has the smaller of them."""
    first, second = spectrum.unsqueeze(-1), spectrum.unsqueeze(-2)
    larger = torch.maximum(first, second) + torch.finfo(rotated.dtype).eps * top.unsqueeze(-1)
    step = (rotated / larger).clamp_(-1, 1)
    lower = torch.where(second >= first, step, -step).tril_(-1)
    return lower - lower.mT


def _geometric_sums(spectrum: Tensor, terms: int) -> Tensor:
    """1 + r + ... + r^(terms - 1) of the ratio r <= 1 of every two: (b, n) -> (b, n, n)."""
    first, second = spectrum.unsqueeze(-1), spectrum.unsqueeze(-2)
    ratio = torch.minimum(first, second) / torch.maximum(first, second)
    sums = torch.ones_like(ratio)
    for _ in range(terms - 1):
        sums.mul_(ratio).add_(1)
    return sums


def orthonormalized(rows: Tensor, correction: Tensor) -> Tensor:
    """Rows of Q M R^-1, given those of Q (b, n, n) and M - I (b, n, n); R^T R = (Q M)^T (Q M).

    Gram-Schmidt in the order of the rows. Allocates, never mutates; no synchronization. Where the
    factorization breaks down the result is not orthogonal.
    """
    turned = torch.baddbmm(rows, correction.mT, rows)
    triangle, _ = torch.linalg.cholesky_ex(exact_bmm(turned, turned.mT))
    columns: Tensor = torch.linalg.solve_triangular(triangle.mT, turned.mT, upper=True, left=False)
    return columns.mT.contiguous()
