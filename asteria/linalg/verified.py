"""Refreshing eigenbases on the host so that nothing unverified is ever used (contract C9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, matched_eigh_basis, orthogonal_iteration

__all__ = ["Failures", "VerifiedBasis", "verified_refresh"]


@dataclass(slots=True)
class Failures:
    """What went wrong in one refresh of stacked blocks."""

    kept: dict[int, str] = field(default_factory=dict)
    """Blocks whose basis in use was kept -> ``"nonfinite factor"`` or ``"no basis"``."""
    retried: int = 0
    """Blocks that float64 has saved."""

    def moved(self, blocks: int) -> Failures:
        """The same for a larger stack, in which these blocks come after so many others."""
        return Failures({blocks + block: why for block, why in self.kept.items()}, self.retried)


@dataclass(slots=True)
class VerifiedBasis:
    """New eigenbases, each finite and orthogonal, or the one that was in use."""

    basis: Tensor
    """(b, n, n), in the dtype of the factor."""
    failures: Failures


def verified_refresh(factor: Tensor, basis: Tensor, *, exact: bool, sort: bool) -> VerifiedBasis:
    """Refresh the bases; where that fails in the factor's dtype, in float64; else keep the old one.

    ``exact`` asks for eigenvectors, else for one orthogonal iteration (``sort`` as there).
    Shapes: factor (b, n, n), basis (b, n, n), both on the host. Allocates, never mutates; any
    thread.
    """
    failures = Failures()
    fresh, usable = _attempt(factor, basis, exact=exact, sort=sort)
    for block in (~usable).nonzero().flatten().tolist():
        one = slice(block, block + 1)
        replacement = basis[one]
        if not bool(torch.isfinite(factor[one]).all()):
            failures.kept[block] = "nonfinite factor"
        elif (saved := _in_float64(factor[one], basis[one], exact=exact, sort=sort)) is None:
            failures.kept[block] = "no basis"
        else:
            failures.retried += 1
            replacement = saved
        fresh[one] = replacement
    return VerifiedBasis(fresh, failures)


def _attempt(factor: Tensor, basis: Tensor, *, exact: bool, sort: bool) -> BasisResult:
    try:
        if exact:
            return matched_eigh_basis(factor, basis)
        return orthogonal_iteration(factor, basis, sort=sort)
    except RuntimeError:  # torch.linalg.LinAlgError: no convergence
        return BasisResult(
            torch.empty_like(factor), factor.new_zeros(len(factor), dtype=torch.bool)
        )


def _in_float64(factor: Tensor, basis: Tensor, *, exact: bool, sort: bool) -> Tensor | None:
    """By the same method, then by an exact one; (1, n, n) in the factor's dtype, or None."""
    for by_eigenvectors in dict.fromkeys((exact, True)):
        fresh, usable = _attempt(factor.double(), basis.double(), exact=by_eigenvectors, sort=sort)
        if bool(usable.all()):
            return fresh.to(factor.dtype)
    return None
