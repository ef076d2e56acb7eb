"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""

from __future__ import annotations

from torch import Tensor

from asteria.algorithms.adam import bias_correction
from asteria.algorithms.algorithm import BlockShape, BlockState, Pair, factors
from asteria.algorithms.rotated_adam import moment_fields, rotate_moments_, rotated_update_
from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.modes import decay_gram_
from asteria.store.stack import FieldSpec

__all__ = ["SOAP"]


class SOAP:
    """Both moments live in the eigenbases; a factor is the decayed sum of G_(k) G_(k)^T."""

    name = "soap"
    has_bases = True
    squeezes = False
    sorts_columns = True

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """Two moments of the block's dims, factor and eigenbasis of each factored mode."""
        return moment_fields(block) + block.factor_fields()

    def begin_(self, state: BlockState, gradient: Tensor, hyper: Hyperparameters) -> None:
        """Factors of the first gradient, begun at zero."""
        _fold_(state, gradient, hyper, gate=None)

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
        """Project, advance Adam there, project back (Algorithm 3)."""
        update = rotated_update_(state, gradient, hyper, scratch=scratch, gate=gate)
        return update, bias_correction(hyper, step)

    def accumulate_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> None:
        """Fold G_(k) G_(k)^T into the factor of every mode."""
        _fold_(state, gradient, hyper, gate=gate)

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


def _fold_(
    state: BlockState, gradient: Tensor, hyper: Hyperparameters, *, gate: Tensor | None
) -> None:
    beta = hyper.shampoo_beta
    for mode, factor in enumerate(factors(state, gradient.dim() - 1)):
        if factor is not None:
            decay_gram_(factor, gradient, mode, beta=beta, weight=1 - beta, gate=gate)
