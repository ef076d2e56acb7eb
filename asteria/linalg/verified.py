"""Refreshing eigenbases on the host so that nothing unverified is ever used (contract C9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.method import RESCUES, Method, refreshed

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


def verified_refresh(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> VerifiedBasis:
    """Refresh the bases; where that fails in the factor's dtype, in float64; else keep the old one.

    ``method`` and ``sort`` as in `refreshed`; in float64 slower methods come after it.
    Shapes: factor (b, n, n), basis (b, n, n), both on the host. Allocates, never mutates; any
    thread.
    """
    failures = Failures()
    fresh, usable = _attempt(factor, basis, method=method, sort=sort)
    for block in (~usable).nonzero().flatten().tolist():
        one = slice(block, block + 1)
        replacement = basis[one]
        if not bool(torch.isfinite(factor[one]).all()):
            failures.kept[block] = "nonfinite factor"
        elif (saved := _in_float64(factor[one], basis[one], method=method, sort=sort)) is None:
            failures.kept[block] = "no basis"
        else:
            failures.retried += 1
            replacement = saved
        fresh[one] = replacement
    return VerifiedBasis(fresh, failures)


def _attempt(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> BasisResult:
    try:
        return refreshed(factor, basis, method=method, sort=sort)
    except RuntimeError:  # torch.linalg.LinAlgError: no convergence
        return BasisResult(
            torch.empty_like(factor), factor.new_zeros(len(factor), dtype=torch.bool)
        )


def _in_float64(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> Tensor | None:
    """By the same method, then by slower ones; (1, n, n) in the factor's dtype, or None."""
    for rescue in RESCUES[method]:
        fresh, usable = _attempt(factor.double(), basis.double(), method=rescue, sort=sort)
        if bool(usable.all()):
            return fresh.to(factor.dtype)
    return None
