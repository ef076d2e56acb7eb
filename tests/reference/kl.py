"""KL-Shampoo and KL-SOAP in float64 numpy, one parameter at a time: slow, and meant to be read.

Source: "Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization",
arXiv 2509.03378: the moving-average KL estimate of the factors, with eigenvalues estimated at every
step in an eigenbasis that is refreshed by QR now and then. Published as yorkerlin/KL-Methods
(a02e622), whose option names and defaults are kept; ``max_precond_dim`` and ``init_factor=None``
are extensions of ours, and so are ranks below 2 and above 3.

Shapes: a block is a tensor (d_1, ..., d_r), the gradient without its dims of size 1. Mode k has a
factor and a basis (d_k, d_k), and eigenvalues (d_k,), all ones in the columns' order.
Eigenvalues are kept here, floored; the published code keeps 1/sqrt(eigenvalue), clamped.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.soap import (
    Array,
    Basis,
    ReferenceSOAP,
    eigenbasis,
    gram,
    orthogonal_iteration,
    project,
    project_back,
    unit_rms,
)

PUBLISHED_INIT_FACTOR = 0.1


def inverse_root(eigenvalues: Array) -> Array:
    """1/sqrt(eigenvalue), and 0 where the eigenvalue is 0: a dead direction stays still. (n,)."""
    safe = np.where(eigenvalues > 0, eigenvalues, 1.0)
    return np.where(eigenvalues > 0, 1.0 / np.sqrt(safe), 0.0)


def along(values: Array, mode: int, rank: int) -> Array:
    """View of ``values`` (n,) that broadcasts along ``mode`` of a rank-``rank`` block."""
    return values.reshape([-1 if axis == mode else 1 for axis in range(rank)])


class _ReferenceKL:
    """What KL-Shampoo and KL-SOAP share: the KL estimate of factors, bases and eigenvalues.

    ``step(gradient)`` returns the parameter after the step; ``lr`` may be assigned between steps.
    The first step only builds the bases: no update, no weight decay, no moment, no eigenvalue.
    Parameters with at most one dim above size 1, or without a dim that ``max_precond_dim`` allows
    a factor, follow :class:`ReferenceSOAP`'s Adam rule. A larger dim beside a factored one has no
    factor and the identity as basis, and its eigenvalues are those of the gradient's own indices.

    init_factor: first eigenvalue on every mode. None takes it from the first non-zero gradient,
        mean square to the power 1/r: the product over the modes is the gradient's mean square.
        The clamp is then relative to that scale, and the samples before the first eigenvalue
        estimate are divided by it too, so that scaling all gradients does not change the direction.
    using_damping: adds eps * tr of the other modes' inverses to each eigenvalue sample.
    using_clamping, max_clamp_value: bound on the inverse root, max(10, min(d_k, max_clamp_value)).
    """

    def __init__(
        self,
        p0: ArrayLike,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float = -1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        normalize_grads: bool = False,
        init_factor: float | None = PUBLISHED_INIT_FACTOR,
        using_damping: bool = False,
        using_clamping: bool = True,
        max_clamp_value: int = 4000,
        max_precond_dim: int | None = None,
    ) -> None:
        """Start at ``p0``, an array of any rank; see the class for the options."""
        self._parameter: Array = np.array(p0, dtype=np.float64)
        self._lr = lr
        self._beta1, self._beta2 = betas
        self._factor_beta = shampoo_beta if shampoo_beta >= 0 else betas[1]
        self._eps = eps
        self._weight_decay = weight_decay
        self._period = precondition_frequency
        self._normalize = normalize_grads
        self._damping = eps if using_damping else 0.0
        self._max_clamp_value = max_clamp_value if using_clamping else None

        self._shape = tuple(d for d in self._parameter.shape if d != 1)
        self._rank = len(self._shape)
        limit = math.inf if max_precond_dim is None else max_precond_dim
        self._adam = None
        if self._rank < 2 or min(self._shape) > limit:
            self._adam = ReferenceSOAP(
                p0, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                normalize_grads=normalize_grads, max_precond_dim=0,
            )  # fmt: skip
        self._factors: list[Array | None] = [
            np.zeros((d, d)) if d <= limit else None for d in self._shape
        ]
        self._bases: list[Basis] | None = None
        self._init_factor = init_factor
        self._scale = init_factor  # first eigenvalue; None until a non-zero gradient was seen
        self._eigenvalues: list[Array] = []
        self._updates = 0
        self._momentum: Array = np.zeros(self._shape)  # in the parameter's coordinates
        self._variance: Array = np.zeros(self._shape)  # KL-SOAP's, in the bases' coordinates

    @property
    def block_dims(self) -> list[tuple[int, bool]]:
        """Size of each mode of the preconditioned block, and whether it has a factor."""
        adam = self._adam is not None
        factors = zip(self._shape, self._factors, strict=True)
        return [(d, not adam and f is not None) for d, f in factors]

    def to_parameter(self, block: Array) -> Array:
        """A block, arranged as the parameter is."""
        return block.reshape(self._parameter.shape)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value
        if self._adam is not None:
            self._adam.lr = value

    def step(self, gradient: ArrayLike) -> Array:
        """One step on a gradient of the parameter's shape; returns a copy of the parameter."""
        if self._adam is not None:
            return self._adam.step(gradient)
        block = np.array(gradient, dtype=np.float64).reshape(self._shape)
        if self._bases is None:
            self._start_eigenvalues(block)
            self._accumulate_first(block)
            self._bases = [None if f is None else eigenbasis(f) for f in self._factors]
            return self._parameter.copy()

        self._updates += 1
        update = self._direction(block, self._bases)
        self._start_eigenvalues(block)
        if self._eigenvalues:
            self._estimate(block, self._bases)
        if self._updates % self._period == 0:
            self._bases = [
                None if f is None or q is None else orthogonal_iteration(f, q)
                for f, q in zip(self._factors, self._bases, strict=True)
            ]
        if self._normalize:
            update = unit_rms(update)
        self._parameter = self._parameter - self.lr * update.reshape(self._parameter.shape)
        self._parameter = self._parameter - self.lr * self._weight_decay * self._parameter
        return self._parameter.copy()

    def _direction(self, block: Array, bases: Sequence[Basis]) -> Array:
        """Update direction, same shape as ``block``, from the state before this step's estimate."""
        raise NotImplementedError

    def _start_eigenvalues(self, block: Array) -> None:
        if self._eigenvalues:
            return
        if self._scale is None and np.any(block):
            self._scale = float(np.mean(block**2)) ** (1 / self._rank)
        if self._scale is not None:
            self._eigenvalues = [np.full(d, self._scale) for d in self._shape]

    def _accumulate_first(self, block: Array) -> None:
        """First samples: G_k G_k^T d_k / numel, whitened by nothing as published.

        With ``init_factor=None`` by the other modes' constant first eigenvalue, like later samples.
        """
        for mode, factor in enumerate(self._factors):
            if factor is not None:
                sample = gram(block, mode) * self._shape[mode] / block.size
                if self._init_factor is None and self._scale is not None:
                    sample = sample / self._scale ** (self._rank - 1)
                self._factors[mode] = (1 - self._factor_beta) * sample

    def _estimate(self, block: Array, bases: Sequence[Basis]) -> None:
        """One KL sample per mode, for its factor and its eigenvalues.

        The sample of mode k is G_k (kron of the other modes' inverses) G_k^T d_k / numel, and its
        diagonal in the basis for the eigenvalues. Which eigenvalues the inverses use is the
        subject of ``schedule``; damping always uses those from before the step.
        """
        before = list(self._eigenvalues)
        for mode in reversed(range(self._rank)):
            for_factor, for_eigenvalues = self._schedule(mode, before)
            factor = self._factors[mode]
            if factor is not None:
                sample = self._sample(block, bases, for_factor, mode, rotated=False)
                sample = gram(sample, mode) * self._shape[mode] / block.size
                beta = self._factor_beta
                self._factors[mode] = beta * factor + (1 - beta) * sample
            squares = self._sample(block, bases, for_eigenvalues, mode, rotated=True) ** 2
            others = tuple(axis for axis in range(self._rank) if axis != mode)
            self._update_eigenvalues(mode, np.mean(squares, axis=others), before)

    def _schedule(self, mode: int, before: list[Array]) -> tuple[list[Array], list[Array]]:
        """Eigenvalues of all modes that the factor and the eigenvalue sample of ``mode`` use.

        Ranks 2 and above 3: all from before the step. Rank 3 as published works from the last mode
        to the first; counting modes 1, 2, 3 and marking with ' what this step has updated already:
        factor 3 and eigenvalues 3 use (1, 2); factor 2 uses (1, 3), eigenvalues 2 use (1, 3');
        factor 1 and eigenvalues 1 use (2', 3).
        """
        if self._rank != 3 or mode == 2:
            return before, before
        now = self._eigenvalues
        if mode == 1:
            return before, [before[0], before[1], now[2]]
        mixed = [before[0], now[1], before[2]]
        return mixed, mixed

    def _sample(
        self,
        block: Array,
        bases: Sequence[Basis],
        eigenvalues: Sequence[Array],
        mode: int,
        *,
        rotated: bool,
    ) -> Array:
        """The block whitened in every mode but ``mode``, same shape (d_1, ..., d_r).

        The other modes are left in their bases' coordinates, where a sum over them is the same;
        ``mode`` is in its basis if ``rotated``, else in the gradient's coordinates.
        """
        used = [q if rotated or axis != mode else None for axis, q in enumerate(bases)]
        whitened = project(block, used)
        for axis in range(self._rank):
            if axis != mode:
                whitened = whitened * along(inverse_root(eigenvalues[axis]), axis, self._rank)
        return whitened

    def _update_eigenvalues(self, mode: int, sample: Array, before: Sequence[Array]) -> None:
        """Moving average of ``sample`` (d_k,), then the floor that clamps the inverse root."""
        if self._damping > 0:
            traces = [float(np.mean(inverse_root(e) ** 2)) for e in before]
            sample = sample + self._damping * math.prod(traces[:mode] + traces[mode + 1 :])
        beta = self._factor_beta
        values = beta * self._eigenvalues[mode] + (1 - beta) * sample
        if self._max_clamp_value is not None:
            bound = float(max(10, min(self._shape[mode], self._max_clamp_value)))
            if self._init_factor is None and self._scale is not None:
                bound *= math.sqrt(PUBLISHED_INIT_FACTOR / self._scale)
            values = np.where(values > 0, np.maximum(values, 1 / bound**2), values)
        self._eigenvalues[mode] = values


class ReferenceKLShampoo(_ReferenceKL):
    """KL-Shampoo: the momentum whitened by all modes' eigenvalues, no second moment."""

    def _direction(self, block: Array, bases: Sequence[Basis]) -> Array:
        self._momentum = self._beta1 * self._momentum + (1 - self._beta1) * block
        if not self._eigenvalues:
            return np.zeros(self._shape)  # the first gradient that is not zero: no scale yet
        roots = np.ones(self._shape)
        for mode, eigenvalues in enumerate(self._eigenvalues):
            roots = roots * along(inverse_root(eigenvalues), mode, self._rank)
        damped = roots / (1 + roots * self._eps)
        return project_back(project(self._momentum, bases) * damped, bases)


class ReferenceKLSOAP(_ReferenceKL):
    """KL-SOAP: Adam without bias correction in the KL bases; no sorting, so v is never permuted."""

    def _direction(self, block: Array, bases: Sequence[Basis]) -> Array:
        self._momentum = self._beta1 * self._momentum + (1 - self._beta1) * block
        squares = project(block, bases) ** 2
        self._variance = self._beta2 * self._variance + (1 - self._beta2) * squares
        whitened = project(self._momentum, bases) / (np.sqrt(self._variance) + self._eps)
        return project_back(whitened, bases)
