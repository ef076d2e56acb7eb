"""Adam in eigenbases: what SOAP and KL-SOAP do with a gradient, whatever their factors are."""

from __future__ import annotations

from torch import Tensor

from asteria.algorithms.adam import adam_update_, bound_ratio_
from asteria.algorithms.algorithm import BlockShape, BlockState, Pair, bases
from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.modes import change_basis_, transform
from asteria.store.layout import FieldSpec

__all__ = [
    "moment_fields",
    "project_moments_",
    "projected_update_",
    "rotate_moments_",
    "rotated_update_",
]


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
    return projected_update_(state, projected, hyper, scratch=scratch, gate=gate)


def projected_update_(
    state: BlockState,
    projected: Tensor,
    hyper: Hyperparameters,
    *,
    scratch: Pair,
    gate: Tensor | None,
) -> Tensor:
    """`rotated_update_` of a gradient that is given in the bases; in scratch it is overwritten."""
    # One without a basis is still the caller's.
    out = projected if any(projected is own for own in scratch) else scratch[0]
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    update = adam_update_(exp_avg, exp_avg_sq, projected, hyper, out=out, gate=gate)
    return transform(update, bases(state, projected.dim() - 1), scratch, transpose=False)


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


def project_moments_(state: BlockState, *, scratch: Pair, bound: float) -> None:
    """The first moment is rotated from the parameter's space into the state's bases.

    The second has lost its basis: what is left is its spectrum. Its rows and columns are put in
    order of their means, the largest first, as new bases have their columns by decreasing
    eigenvalue. (Rotating it by squares flattens it, and was measured far worse.)
    Arguments as in `Algorithm.project_moments_`.
    """
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    basis = bases(state, exp_avg.dim() - 1)
    change_basis_(exp_avg, [None] * len(basis), basis, scratch, None)
    for mode, q in enumerate(basis):
        if q is not None:
            exp_avg_sq.copy_(_by_rank(exp_avg_sq, mode))
    bound_ratio_(exp_avg, exp_avg_sq, bound, out=scratch[0], gate=None)


def _by_rank(x: Tensor, mode: int) -> Tensor:
    """``x`` (b, d_0, ...) with its slices along ``mode`` by decreasing sum."""
    others = [dim for dim in range(1, x.dim()) if dim != mode + 1]
    sums = x.sum(others, keepdim=True) if others else x
    order = sums.argsort(dim=mode + 1, descending=True, stable=True)
    return x.take_along_dim(order, mode + 1)
