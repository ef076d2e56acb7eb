"""SOAP in float64 numpy, one parameter at a time: slow, and meant to be read beside the paper.

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321,
Algorithms 3 (one step) and 4 (power iteration and QR), in the form the authors published
(nikhilvyas/SOAP, a1e5535), whose option names and defaults are kept.

It is written from the algebra and not from that program: the first moment stays in the parameter's
own coordinates and is projected when needed. Rotating a moment whenever the basis changes gives the
same numbers, because the bases are orthogonal.

Shapes: a block is a tensor (d_1, ..., d_r); the factor and the basis of mode k are (d_k, d_k).
A mode without a factor has the basis None, which stands for the identity.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Basis = Array | None


def times_mode(block: Array, matrix: Array, mode: int) -> Array:
    """Mode product: every fibre x of ``block`` along ``mode`` becomes ``matrix @ x``.

    Shapes: block (d_1, ..., d_r), matrix (a, d_mode) -> the block's shape, with a for d_mode.
    """
    return np.moveaxis(np.tensordot(matrix, block, axes=(1, mode)), 0, mode)


def project(block: Array, bases: Sequence[Basis]) -> Array:
    """Coordinates of a block (d_1, ..., d_r) in the bases: mode k is multiplied by Q_k^T."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            block = times_mode(block, basis.T, mode)
    return block


def project_back(block: Array, bases: Sequence[Basis]) -> Array:
    """Inverse of :func:`project`: mode k of a block (d_1, ..., d_r) is multiplied by Q_k."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            block = times_mode(block, basis, mode)
    return block


def gram(block: Array, mode: int) -> Array:
    """G_k G_k^T of the unfolding along ``mode``: block (d_1, ..., d_r) -> (d_mode, d_mode)."""
    unfolded = np.moveaxis(block, mode, 0).reshape(block.shape[mode], -1)
    return unfolded @ unfolded.T


def eigenbasis(factor: Array) -> Array:
    """Eigenvectors (n, n) of a factor (n, n), as columns, the largest eigenvalue first."""
    _, vectors = np.linalg.eigh(factor + 1e-30 * np.eye(len(factor)))
    return np.array(vectors[:, ::-1], dtype=np.float64)


def orthogonal_iteration(factor: Array, basis: Array) -> Array:
    """Algorithm 4: one power iteration from the old basis, then QR. Both (n, n) -> (n, n)."""
    return np.linalg.qr(factor @ basis)[0]


def unit_rms(update: Array) -> Array:
    """The update, any shape, divided by its root mean square (published ``normalize_grads``)."""
    rms = float(np.sqrt(np.mean(update**2)))
    return update / (1e-30 + rms)


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Neighbouring dims multiplied, from the left, for as long as the product stays in ``limit``.

    Dims of size 1 at either end disappear; a dim above the limit stays alone; () becomes (1,).
    """
    merged: list[int] = []
    run = 1
    for size in shape:
        if run > 1 and run * size > limit:
            merged.append(run)
            run = size
        else:
            run *= size
    return tuple([*merged, run] if run > 1 or not merged else merged)


class ReferenceSOAP:
    """One parameter under SOAP: ``step(gradient)`` returns the parameter after the step.

    Options carry the published names; ``shampoo_beta=-1`` means ``betas[1]``. ``lr`` may be
    assigned between steps. Vectors and scalars without a factor follow Adam with bias correction.
    The first step only builds the bases: no update, no weight decay, no moment.
    """

    def __init__(
        self,
        p0: ArrayLike,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        data_format: str = "channels_first",
        correct_bias: bool = True,
    ) -> None:
        """Start at ``p0``, an array of any rank; the options are the published ones."""
        self.parameter: Array = np.array(p0, dtype=np.float64)
        self.lr = lr
        self._beta1, self._beta2 = betas
        self._factor_beta = shampoo_beta if shampoo_beta >= 0 else betas[1]
        self._eps = eps
        self._weight_decay = weight_decay
        self._period = precondition_frequency
        self._normalize = normalize_grads
        self._correct_bias = correct_bias

        rank = self.parameter.ndim
        self._channels_last = data_format == "channels_last" and merge_dims and rank == 4
        arranged = self.parameter.transpose(0, 3, 1, 2) if self._channels_last else self.parameter
        self._arranged_shape = arranged.shape
        merges = merge_dims and rank != 1
        self._shape = merged_shape(arranged.shape, max_precond_dim) if merges else arranged.shape

        self._factors: list[Array | None] = [
            np.zeros((d, d)) if d <= max_precond_dim and (rank != 1 or precondition_1d) else None
            for d in self._shape
        ]
        self._bases: list[Basis] | None = None
        self._updates = 0
        self._momentum: Array = np.zeros(self._shape)  # in the parameter's coordinates
        self._variance: Array = np.zeros(self._shape)  # in the bases' coordinates

    def step(self, gradient: ArrayLike) -> Array:
        """Algorithm 3 for one gradient of the parameter's shape; returns the parameter (a copy)."""
        block = self._to_block(np.array(gradient, dtype=np.float64))
        if self._bases is None:
            self._accumulate(block)
            self._bases = [None if f is None else eigenbasis(f) for f in self._factors]
            return self.parameter.copy()

        self._updates += 1
        update = self.to_parameter(self._direction(block, self._bases))
        if self._normalize:
            update = unit_rms(update)
        self.parameter = self.parameter - self.lr * self._bias_correction() * update
        self.parameter = self.parameter - self.lr * self._weight_decay * self.parameter

        self._accumulate(block)
        if self._updates % self._period == 0:
            self._refresh(self._bases)
        return self.parameter.copy()

    def _direction(self, block: Array, bases: Sequence[Basis]) -> Array:
        """Adam in the eigenbasis, without bias correction: block (d_1, ..., d_r), same shape."""
        self._momentum = self._beta1 * self._momentum + (1 - self._beta1) * block
        squares = project(block, bases) ** 2
        self._variance = self._beta2 * self._variance + (1 - self._beta2) * squares
        whitened = project(self._momentum, bases) / (np.sqrt(self._variance) + self._eps)
        return project_back(whitened, bases)

    def _bias_correction(self) -> float:
        """Adam's correction as one number: the published code applies it to the step size."""
        if not self._correct_bias:
            return 1.0
        unbias_variance = np.sqrt(1 - self._beta2**self._updates)
        return float(unbias_variance / (1 - self._beta1**self._updates))

    def _accumulate(self, block: Array) -> None:
        beta = self._factor_beta
        for mode, factor in enumerate(self._factors):
            if factor is not None:
                self._factors[mode] = beta * factor + (1 - beta) * gram(block, mode)

    def _refresh(self, bases: list[Basis]) -> None:
        """Sort by estimated eigenvalue, the second moment alike, then iterate each basis."""
        for mode, (factor, basis) in enumerate(zip(self._factors, bases, strict=True)):
            if factor is None or basis is None:
                continue
            estimates = np.diag(basis.T @ factor @ basis)
            order = np.argsort(-estimates, kind="stable")
            self._variance = np.take(self._variance, order, axis=mode)
            bases[mode] = orthogonal_iteration(factor, basis[:, order])

    def published_state(self) -> dict[str, Any]:
        """The state as the published program keeps it, which has both moments in the bases, and an
        empty list for a dim without a factor.
        """
        bases = self._bases or [None] * len(self._factors)
        moments = {"exp_avg": project(self._momentum, bases), "exp_avg_sq": self._variance}
        return {
            "step": self._updates,
            **{name: self.to_parameter(moment).copy() for name, moment in moments.items()},
            "GG": [[] if f is None else f.copy() for f in self._factors],
            "Q": [[] if q is None else q.copy() for q in bases],
            "precondition_frequency": self._period,
            "shampoo_beta": self._factor_beta,
        }

    @property
    def block_dims(self) -> list[tuple[int, bool]]:
        """Size of each mode of the preconditioned block, and whether it has a factor."""
        return [(d, f is not None) for d, f in zip(self._shape, self._factors, strict=True)]

    def _to_block(self, tensor: Array) -> Array:
        arranged = tensor.transpose(0, 3, 1, 2) if self._channels_last else tensor
        return arranged.reshape(self._shape)

    def to_parameter(self, block: Array) -> Array:
        """A block, arranged as the parameter is."""
        arranged = block.reshape(self._arranged_shape)
        return arranged.transpose(0, 2, 3, 1) if self._channels_last else arranged
