"""Kronecker factors by Kullback-Leibler minimization (arXiv 2509.03378): KL-Shampoo, KL-SOAP.

Shapes: b blocks of rank r with dims (d_0, ..., d_{r-1}), N their product. Mode k has eigenvalue
estimates lambda_k (b, d_k), kept as inverse roots s_k = lambda_k^(-1/2), and, unless the dim is
above the limit, a factor S_k and an eigenbasis Q_k (b, d_k, d_k). A mode without a basis has the
identity as basis: its eigenvalues precondition it by index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from asteria.algorithms.adam import ema_
from asteria.algorithms.algorithm import (
    BlockShape,
    BlockState,
    Contribution,
    Pair,
    bases,
)
from asteria.algorithms.rotated_adam import (
    moment_fields,
    project_moments_,
    rotate_moments_,
    rotated_update_,
)
from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import Factors
from asteria.linalg.modes import replace_, scale_modes_, transform
from asteria.store.layout import FieldSpec

__all__ = ["KLSOAP", "KLShampoo"]

Self = TypeVar("Self", bound="_KullbackLeibler")

# The published first eigenvalue. Bounds on inverse roots were chosen for gradients of that scale.
_PUBLISHED_EIGENVALUE = 0.1


class _KullbackLeibler:
    """What both optimizers share: statistics and eigenvalues."""

    has_bases = True
    squeezes = True
    sorts_columns = False
    rows_alike = False
    can_defer = False
    in_bases = False

    def __init__(self, bases_in: torch.dtype | None = None, factors: Factors = "full") -> None:
        self.bases_in = bases_in
        self.factors: Factors = factors

    def storing(self: Self, bases_in: torch.dtype | None, factors: Factors) -> Self:
        """The same rule with eigenbases stored in this dtype and factors in this form."""
        return type(self)(bases_in, factors)

    def _kl_fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """Factor and eigenbasis of each factored mode, inverse roots of all."""
        factors = block.factor_fields(self.bases_in, self.factors)
        roots = (FieldSpec(f"inverse_root_{mode}", (size,)) for mode, size in enumerate(block.dims))
        return (*factors, *roots, FieldSpec("eigenvalue_scale", ()))

    def first_contributions(
        self, state: BlockState, gradient: Tensor, hyper: Hyperparameters
    ) -> Iterator[Contribution]:
        """The gradient, not whitened; constant eigenvalues, if none are there."""
        rank = gradient.dim() - 1
        scaled = gradient
        if hyper.init_factor is None:
            _take_scale_(state, gradient, None)
            # Whitened, so that the first contribution weighs as much as the following ones.
            typical = state["inverse_root_0"].median(-1, keepdim=True).values
            whiten = typical ** (rank - 1)
            scaled = scale_modes_(gradient.clone(), [whiten])
        else:
            waiting = state["eigenvalue_scale"] == 0
            state["eigenvalue_scale"].masked_fill_(waiting, _PUBLISHED_EIGENVALUE)
            for mode in range(rank):
                root = state[f"inverse_root_{mode}"]
                root.masked_fill_(waiting.unsqueeze(-1), hyper.init_factor**-0.5)
        for mode, basis in enumerate(bases(state, rank)):
            if basis is not None:
                yield _contribution(scaled, mode, hyper)

    def scale(self, hyper: Hyperparameters, step: int) -> float:
        """1: as published, without bias correction."""
        return 1.0

    def contributed_tensors(self, block: BlockShape) -> int:
        """The gradient whitened on the other modes, for each factor."""
        return sum(block.factored)

    def contributions(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> Iterator[Contribution]:
        """The gradient, whitened on all other modes, to the factor of every mode.

        S_k <- beta S_k + (1 - beta) d_k/N W_k W_k^T, where W_k is the unfolding of the gradient
        multiplied by s_j Q_j^T on every mode j other than k; and
        lambda_k <- beta lambda_k + (1 - beta) mean((Q_k^T W_k)^2) over the other modes.
        """
        last = gradient.dim() - 2
        if hyper.init_factor is None:
            _take_scale_(state, gradient, gate)
        old = [state[f"inverse_root_{mode}"].clone() for mode in range(last + 1)]
        basis = bases(state, last + 1)

        # W of the last mode lacks only its scales; one more product projects it completely.
        partial = transform(gradient, [*basis[:last], None], scratch, transpose=True)
        if partial is gradient:
            partial = scratch[0].copy_(gradient)
        free = scratch[1] if partial is scratch[0] else scratch[0]
        projected = transform(partial, [*[None] * last, basis[last]], scratch, transpose=True)
        power = torch.mul(projected, projected, out=free)

        new = list(old)
        for mode, damping in reversed(list(enumerate(_damping(old, hyper)))):
            spectrum = _weighted_mean(power, _seen_by_eigenvalues(old, new, mode), mode)
            if damping is not None:
                spectrum = spectrum + damping
            new[mode] = _next_root(state, old[mode], spectrum, hyper)
        for mode in reversed(range(last + 1)):
            if basis[mode] is not None:
                others = [None if j == mode else q for j, q in enumerate(basis)]
                if mode != last:
                    partial = transform(gradient, others, scratch, transpose=True)
                    if partial is gradient:
                        partial = scratch[0].copy_(gradient)
                scales = _seen_by_factor(old, new, mode)
                yield _contribution(scale_modes_(partial, scales), mode, hyper)
        for mode, root in enumerate(new):
            replace_(state[f"inverse_root_{mode}"], root, gate)


class KLShampoo(_KullbackLeibler):
    """Momentum in the parameter's space, preconditioned by the inverse roots of both factors."""

    name = "kl-shampoo"

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """One moment, factor and eigenbasis of each factored mode, inverse roots of all."""
        return (FieldSpec("exp_avg", block.dims), *self._kl_fields(block))

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
        """Q (s / (1 + eps s)) Q^T applied to the momentum, s the product of all modes' roots."""
        rank = gradient.dim() - 1
        exp_avg, basis = state["exp_avg"], bases(state, rank)
        ema_(exp_avg, gradient, hyper.beta1, gate)
        projected = transform(exp_avg, basis, scratch, transpose=True)
        free = scratch[1] if projected is scratch[0] else scratch[0]
        # s / (1 + eps s) = 1 / (1/s + eps), and 1/s = 0 forbids the direction (s = 0) as well.
        inverse = [state[f"inverse_root_{mode}"].reciprocal() for mode in range(rank)]
        denominator = free.copy_(inverse[0].view(*inverse[0].shape, *[1] * (rank - 1)))
        scale_modes_(denominator, [None, *inverse[1:]])
        update = torch.div(projected, denominator.add_(hyper.eps), out=free)
        return transform(update, basis, scratch, transpose=False), self.scale(hyper, step)

    def rotate_(
        self,
        state: BlockState,
        fresh: list[Tensor | None],
        *,
        scratch: Pair,
        gate: Tensor | None,
        bound: float | None = None,
    ) -> None:
        """Nothing: the moment is in the parameter's space, eigenvalues stay with their columns."""

    def project_moments_(self, state: BlockState, *, scratch: Pair, bound: float) -> None:
        """Nothing, for the moment is in the parameter's space; the eigenvalues are put in order."""
        _rank_roots_(state)


class KLSOAP(_KullbackLeibler):
    """Adam, without bias correction, in the eigenbases of the Kullback-Leibler factors."""

    name = "kl-soap"

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """Two moments, factor and eigenbasis of each factored mode, inverse roots of all."""
        return moment_fields(block) + self._kl_fields(block)

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
        """Project, advance Adam there, project back."""
        update = rotated_update_(state, gradient, hyper, scratch=scratch, gate=gate)
        return update, self.scale(hyper, step)

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
        _rank_roots_(state)


def _rank_roots_(state: BlockState) -> None:
    """Eigenvalues whose basis is gone in order, the largest first, as bases have their columns."""
    for mode, basis in enumerate(bases(state, state["exp_avg"].dim() - 1)):
        if basis is not None:
            root = state[f"inverse_root_{mode}"]
            root.copy_(root.sort(-1).values)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _take_scale_(state: BlockState, gradient: Tensor, gate: Tensor | None) -> None:
    """Take the first eigenvalues from the gradient, for blocks that had only zero gradients.

    lambda = mean(G^2)^(1/r) on every mode, so that their product over the modes is the mean square
    of the gradient: the optimizer does not depend on the gradient's scale.
    """
    rank = gradient.dim() - 1
    scale = state["eigenvalue_scale"]
    waiting = scale == 0 if gate is None else (scale == 0) & (gate > 0)
    mean_square = gradient.square().mean(list(range(1, rank + 1)))
    scale.copy_(torch.where(waiting, mean_square ** (1 / rank), scale))
    first_root = _finite(scale.rsqrt()).unsqueeze(-1)
    for mode in range(rank):
        root = state[f"inverse_root_{mode}"]
        root.copy_(torch.where(waiting.unsqueeze(-1), first_root, root))


def _contribution(whitened: Tensor, mode: int, hyper: Hyperparameters) -> Contribution:
    weight = (1 - hyper.shampoo_beta) * whitened.shape[mode + 1] / whitened[0].numel()
    return Contribution(mode, whitened, weight)


def _damping(roots: list[Tensor], hyper: Hyperparameters) -> list[Tensor | None]:
    """What ``damp_factors`` adds to each mode's spectrum: eps times the other modes' mean s^2."""
    if not hyper.damp_factors:
        return [None] * len(roots)
    traces = [root.square().mean(-1, keepdim=True) for root in roots]
    total = hyper.eps * math.prod(traces[1:], start=traces[0])
    return [total / trace for trace in traces]


def _seen_by_eigenvalues(old: list[Tensor], new: list[Tensor], mode: int) -> list[Tensor | None]:
    """The inverse roots of the other modes that mode's eigenvalues are estimated with.

    All are those of before the step, but for the published code of rank 3, which goes from the
    last mode to the first and uses the new ones of the mode it has just done.
    """
    newest = mode + 1 if len(old) == 3 else None
    return [None if j == mode else (new[j] if j == newest else old[j]) for j in range(len(old))]


def _seen_by_factor(old: list[Tensor], new: list[Tensor], mode: int) -> list[Tensor | None]:
    """Likewise for the mode's factor: in the published code of rank 3 only mode 0 sees new ones."""
    if len(old) == 3 and mode == 0:
        return _seen_by_eigenvalues(old, new, mode)
    return [None if j == mode else root for j, root in enumerate(old)]


def _weighted_mean(power: Tensor, roots: list[Tensor | None], mode: int) -> Tensor:
    """Mean of power (b, d_0, ...) times s_j^2 over every mode j but ``mode``: (b, d_mode)."""
    result = power
    for j in reversed(range(len(roots))):
        root = roots[j]
        if root is not None:
            weights = root.square().div_(root.shape[-1]).unsqueeze(-1)
            moved = result.movedim(j + 1, -1)
            rows = moved.reshape(moved.shape[0], -1, moved.shape[-1])
            result = torch.bmm(rows, weights).view(moved.shape[:-1])
    return result


def _next_root(state: BlockState, root: Tensor, spectrum: Tensor, hyper: Hyperparameters) -> Tensor:
    """The mode's inverse roots after its eigenvalues took in ``spectrum``; all (b, d_k)."""
    eigenvalues = _finite(root.square().reciprocal_())
    eigenvalues.lerp_(spectrum, 1 - hyper.shampoo_beta)
    fresh = _finite(eigenvalues.rsqrt_())
    if hyper.max_inverse_root is None:
        return fresh
    bound = max(10.0, min(float(root.shape[-1]), hyper.max_inverse_root))
    relative = (_PUBLISHED_EIGENVALUE / state["eigenvalue_scale"]).sqrt_()
    return torch.minimum(fresh, bound * relative.unsqueeze(-1))
