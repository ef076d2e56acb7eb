"""Adam in eigenbases: what SOAP and KL-SOAP do with a gradient, whatever their factors are."""

from __future__ import annotations

from torch import Tensor

from asteria.algorithms.adam import adam_update_, bound_ratio_
from asteria.algorithms.algorithm import BlockShape, BlockState, Pair, bases
from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.modes import change_basis_, transform
from asteria.store.stack import FieldSpec

__all__ = ["moment_fields", "rotate_moments_", "rotated_update_"]


def moment_fields(block: BlockShape) -> tuple[FieldSpec, ...]:
    """Both moments, of the block's dims; they live in the eigenbases."""
    return FieldSpec("exp_avg", block.dims), FieldSpec("exp_avg_sq", block.dims)


def rotated_update_(
    state: BlockState,
    gradient: Tensor,
    hyper: Hyperparameters,
    *,
    scratch: Pair,
    gate: Tensor | None,
) -> Tensor:
    """Project the gradient, advance Adam there, project the update back; in scratch.

    Shapes and gate as in `Algorithm.direction_`; the bias corrections are not in it.
    Source: SOAP (arXiv 2409.11321), Algorithm 3.
    """
    basis = bases(state, gradient.dim() - 1)
    projected = transform(gradient, basis, scratch, transpose=True)
    # A gradient without a basis is still the caller's.
    out = scratch[0] if projected is gradient else projected
    moments = state["exp_avg"], state["exp_avg_sq"]
    update = adam_update_(*moments, projected, hyper, out=out, gate=gate)
    return transform(update, basis, scratch, transpose=False)


def rotate_moments_(
    state: BlockState,
    fresh: list[Tensor | None],
    *,
    scratch: Pair,
    gate: Tensor | None,
    bound: float | None,
) -> None:
    """The first moment is rotated; the second stays with its columns (contract C4).

    Arguments as in `Algorithm.rotate_`.
    """
    change_basis_(state["exp_avg"], bases(state, len(fresh)), fresh, scratch, gate)
    if bound is not None:
        moments = state["exp_avg"], state["exp_avg_sq"]
        bound_ratio_(*moments, bound, out=scratch[0], gate=gate)
