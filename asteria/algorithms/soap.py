"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asteria.algorithms.adam import bias_correction
from asteria.algorithms.algorithm import (
    Algorithm,
    BlockShape,
    BlockState,
    Contribution,
    Pair,
    bases,
)
from asteria.algorithms.rotated_adam import (
    moment_fields,
    project_moments_,
    projected_update_,
    rotate_moments_,
    rotated_update_,
)
from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import Factors
from asteria.store.layout import FieldSpec

__all__ = ["SOAP"]


class SOAP:
    """Both moments live in the eigenbases; a factor is the decayed sum of G_(k) G_(k)^T."""

    name = "soap"
    has_bases = True
    squeezes = False
    sorts_columns = True
    rows_alike = True

    def __init__(self, bases_in: torch.dtype | None = None, factors: Factors = "full") -> None:
        self.bases_in = bases_in
        self.factors: Factors = factors

    @property
    def in_bases(self) -> bool:
        """Whether Q_k^T L_k Q_k is kept in place of every factor L_k.

        With G' = G in all bases it grows by G'_(k) G'_(k)^T: the other modes' bases are orthogonal
        and drop out, and G' is what Adam needs anyway. Bases begin at the identity, of which the
        first gradient, and factors that have seen no more, are given.
        """
        return self.factors == "rotated"

    @property
    def can_defer(self) -> bool:
        """Unless factors are packed or rotated, or bases have to be widened."""
        return self.factors == "full" and self.bases_in is None

    def storing(self, bases_in: torch.dtype | None, factors: Factors) -> Algorithm:
        """The same rule with eigenbases stored in this dtype and factors in this form."""
        return type(self)(bases_in, factors)

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """Two moments of the block's dims, factor and eigenbasis of each factored mode."""
        return moment_fields(block) + block.factor_fields(self.bases_in, self.factors)

    def first_contributions(
        self, state: BlockState, gradient: Tensor, hyper: Hyperparameters
    ) -> Iterator[Contribution]:
        """As later ones: factors begin at zero."""
        return _contributions(state, gradient, hyper)

    def direction_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        step: int,
        scratch: Pair,
        gate: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Project, advance Adam there, project back (Algorithm 3).

        With ``in_bases`` the gradient is projected, and overwritten.
        """
        update_ = projected_update_ if self.in_bases else rotated_update_
        update = update_(state, gradient, hyper, scratch=scratch, gate=gate)
        return update, self.scale(hyper, step)

    def scale(self, hyper: Hyperparameters, step: int) -> float:
        """The bias correction."""
        return bias_correction(hyper, step)

    def contributions(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> Iterator[Contribution]:
        """G_(k) G_(k)^T to the factor of every mode."""
        return _contributions(state, gradient, hyper)

    def contributed_tensors(self, block: BlockShape) -> int:
        """The gradient, for all modes."""
        return 1

    def rotate_(
        self,
        state: BlockState,
        fresh: list[Tensor | None],
        *,
        scratch: Pair,
        gate: Tensor | None,
        bound: float | None = None,
    ) -> None:
        """The first moment is rotated; the second stays with its columns (contract C4)."""
        rotate_moments_(state, fresh, scratch=scratch, gate=gate, bound=bound)

    def project_moments_(self, state: BlockState, *, scratch: Pair, bound: float) -> None:
        """The first moment is rotated, the second keeps its spectrum."""
        project_moments_(state, scratch=scratch, bound=bound)


def _contributions(
    state: BlockState, gradient: Tensor, hyper: Hyperparameters
) -> Iterator[Contribution]:
    factored = [m for m, q in enumerate(bases(state, gradient.dim() - 1)) if q is not None]
    for mode in factored:
        yield Contribution(mode, gradient, 1 - hyper.shampoo_beta, again=mode != factored[0])
