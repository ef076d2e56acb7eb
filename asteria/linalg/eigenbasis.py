"""Eigenbases of stacked symmetric factors: exact, and by one orthogonal iteration.

Shapes: L (b, n, n) symmetric positive semidefinite factors, Q (b, n, n) orthogonal eigenbases.
Numeric failure is a value: a basis comes back beside the blocks for which it is not to be used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asteria.linalg.precision import exact_bmm

__all__ = [
    "BasisResult",
    "by_quotient",
    "eigh_basis",
    "is_orthogonal",
    "matched_eigh_basis",
    "orthogonal_iteration",
    "permuted",
]

_PROBES = 8


class BasisResult(NamedTuple):
    """New eigenbases and whether each may be used."""

    basis: Tensor
    """(b, n, n), in the dtype of the factor."""
    usable: Tensor
    """(b,) bool on the basis' device: finite and orthogonal."""


def eigh_basis(factor: Tensor) -> BasisResult:
    """Eigenvectors of each factor by ``eigh``, columns by decreasing eigenvalue.

    Always in float64: float32 eigensolvers fail, or return garbage, on nearly singular factors,
    which first factors are. Shapes: factor (b, n, n) -> basis (b, n, n). Allocates, never
    mutates; any thread; waits for the device. A factor of zeros has the identity. One that is not
    finite, or for which the solver does not converge, yields it too and is marked as not usable.
    """
    basis = torch.empty_like(factor)
    usable = torch.isfinite(factor).all(-1).all(-1)
    solvable = usable & factor.any(-1).any(-1)
    for index, (ok, solve) in enumerate(zip(usable.tolist(), solvable.tolist(), strict=True)):
        if solve:
            try:
                vectors = torch.linalg.eigh(factor[index].double()).eigenvectors
            except RuntimeError:  # torch.linalg.LinAlgError: no convergence
                ok = False
            else:
                basis[index] = vectors.flip(-1)
        if not (ok and solve):
            basis[index] = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            usable[index] = ok
    return BasisResult(basis, usable & is_orthogonal(basis))


def matched_eigh_basis(factor: Tensor, basis: Tensor) -> BasisResult:
    """Exact eigenbases whose columns stand where the basis in use has its nearest ones.

    Columns are matched by rank: the eigenvector of the i-th largest eigenvalue replaces the column
    with the i-th largest Rayleigh quotient. Shapes and failures as in `eigh_basis`.
    """
    fresh, usable = eigh_basis(factor)
    order = by_quotient(exact_bmm(basis.mT, factor) * basis.mT)
    return BasisResult(permuted(fresh.mT.contiguous(), order.argsort(-1)).mT, usable)


def by_quotient(products: Tensor) -> Tensor:
    """Column indices by decreasing q^T L q, (b, n); products = (Q^T L) * Q^T, (b, n, n)."""
    return products.sum(-1).argsort(dim=-1, descending=True, stable=True)


def permuted(rows: Tensor, order: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row i of each block is row ``order[i]`` of ``rows``; (b, n, n) contiguous, (b, n)."""
    blocks, size = order.shape
    first = torch.arange(blocks, device=order.device).unsqueeze(-1) * size
    out = torch.empty_like(rows) if out is None else out
    torch.index_select(rows.view(-1, size), 0, (order + first).view(-1), out=out.view(-1, size))
    return out


def orthogonal_iteration(factor: Tensor, basis: Tensor, *, sort: bool) -> BasisResult:
    """One step of orthogonal iteration, Q <- qr(L Q), warm-started from the basis in use.

    With ``sort`` the columns take part by decreasing Rayleigh quotient q^T L q, which
    Gram-Schmidt rewards: the leading invariant subspaces stay exact. The new columns are
    put back where the old ones stood, so that a column follows its eigenvector and nothing that
    is stored by column (the second moment) needs to be permuted.

    Shapes: factor (b, n, n), basis (b, n, n) -> basis (b, n, n). Allocates, never mutates; any
    thread; no synchronization with the device.
    Source: SOAP (arXiv 2409.11321), Algorithm 4.
    """
    # In rows of Q^T: bases lie in memory column after column, and so no copy has to transpose.
    images = exact_bmm(basis.mT, factor)
    if sort:
        products = images * basis.mT
        order = by_quotient(products)
        # Two large tensors take turns: fresh memory costs more than what is written to it.
        fresh = _orthonormalized(permuted(images, order, out=products).mT)
        fresh = permuted(fresh.mT, order.argsort(-1), out=images).mT
    else:
        fresh = _orthonormalized(images.mT)
    return BasisResult(fresh, is_orthogonal(fresh))


def _orthonormalized(columns: Tensor) -> Tensor:
    """The Q of QR, in place; `torch.linalg.qr` would also copy a triangle that nobody needs.

    Shapes: (b, n, n), each matrix column after column in memory.
    """
    scales = columns.new_empty(columns.shape[:-1])
    torch.geqrf(columns, out=(columns, scales))
    product: Tensor = torch.linalg.householder_product(columns, scales, out=columns)
    return product


def is_orthogonal(basis: Tensor, *, bound: float = 1e-3) -> Tensor:
    """Whether Q^T Q = I, estimated from a few fixed random vectors (Hutchinson), in O(n^2).

    E |(Q^T Q - I) z|^2 = |Q^T Q - I|_F^2 for Gaussian z, so a basis passes if the estimated
    Frobenius norm is below ``bound`` sqrt(n), by default a hundred times what Householder QR
    leaves in float32.
    Shapes: (b, n, n) -> (b,) bool. A basis with inf or nan does not pass.
    """
    size = basis.shape[-1]
    generator = torch.Generator(basis.device).manual_seed(size)
    probes = torch.randn(size, _PROBES, generator=generator, dtype=basis.dtype, device=basis.device)
    probes = probes.expand(len(basis), -1, -1)
    residual = exact_bmm(basis.mT, exact_bmm(basis, probes)) - probes
    return residual.square().sum((-2, -1)) / _PROBES <= bound**2 * size
