"""Gradients for which two correct implementations must agree to rounding.

A first gradient whose factor is singular leaves the basis of the null space to the eigensolver, and
everything after depends on that choice: Adam's second moment is not invariant to it. Tall and wide
matrices, columns and vectors have such a factor always. So the gradients are made so that the
choice does not matter (:func:`within_subspace`) or is the same for all (:func:`aligned_start`).
"""

import math
from typing import Protocol

import numpy as np

from tests.reference.soap import Array, times_mode


class HasBlock(Protocol):
    """The part of a reference that says how its parameter is preconditioned."""

    @property
    def block_dims(self) -> list[tuple[int, bool]]:
        """Size of each mode of the block, and whether it has a factor."""

    def to_parameter(self, block: Array) -> Array:
        """A block, arranged as the parameter is."""


def multilinear_rank(dims: list[tuple[int, bool]]) -> list[int]:
    """Largest rank that each mode of one generic sample can have; unfactored modes keep their size.

    Rank k is at most the product of the others, so the others may have to shrink too.
    """
    ranks = [size for size, _ in dims]
    for _ in dims:
        for mode, (size, factored) in enumerate(dims):
            others = math.prod(ranks[:mode] + ranks[mode + 1 :])
            ranks[mode] = min(size, others) if factored else size
    return ranks


def is_regular(reference: HasBlock, samples: int = 1) -> bool:
    """Whether every factor is regular once it holds this many generic gradients."""
    sizes = [size for size, _ in reference.block_dims]
    return all(
        size <= samples * math.prod(sizes[:mode] + sizes[mode + 1 :])
        for mode, (size, factored) in enumerate(reference.block_dims)
        if factored
    )


def well_conditioned(block: Array, modes: list[int]) -> Array:
    """The block with the singular values of its unfoldings along ``modes`` raised, kept distinct.

    Same shape. A gram matrix is then well conditioned, and its eigenvectors exact to rounding.
    """
    for mode in modes:
        moved = np.moveaxis(block, mode, 0)
        left, values, right = np.linalg.svd(moved.reshape(len(moved), -1), full_matrices=False)
        raised = (left * (0.3 * values[0] + 0.7 * values)) @ right
        block = np.moveaxis(raised.reshape(moved.shape), 0, mode)
    return block


def within_subspace(reference: HasBlock, steps: int, rng: np.random.Generator) -> Array:
    """Correlated gradients (steps, *parameter's shape) that span their subspaces at the first step.

    Where a factor cannot be regular the gradients stay in one random subspace of each mode, so
    nothing ever falls into the null space, whatever its basis. Elsewhere they are unrestricted.
    """
    dims = reference.block_dims
    ranks = multilinear_rank(dims)
    frames = [
        np.linalg.qr(rng.normal(size=(size, rank)))[0] * np.linspace(1.0, 0.6, rank)
        for (size, _), rank in zip(dims, ranks, strict=True)
    ]
    cores = rng.normal(size=ranks) * 0.6 + rng.normal(size=(steps, *ranks))
    cores[0] = well_conditioned(cores[0], [mode for mode, (_, f) in enumerate(dims) if f])
    gradients = []
    for block in cores:
        for mode, frame in enumerate(frames):
            block = times_mode(block, frame, mode)
        gradients.append(reference.to_parameter(block))
    return np.stack(gradients)


def aligned_start(reference: HasBlock, steps: int, rng: np.random.Generator) -> Array:
    """Gradients (steps, *parameter's shape): a superdiagonal first one, then unrestricted ones.

    The first factors are then exactly diagonal: every eigensolver returns coordinate axes, at most
    in another order within the null space, and SOAP sorts its columns at the first refresh. Use it
    where the factors are regular by then: the QR of a singular product is arbitrary as well.
    """
    dims = [size for size, _ in reference.block_dims]
    blocks = rng.normal(size=dims) * 0.6 + rng.normal(size=(steps, *dims))
    if dims:
        count = min(dims) if len(dims) > 1 else 1
        blocks[0] = 0.0
        blocks[0][tuple(np.arange(count) for _ in dims)] = np.linspace(2.0, 1.0, count)
    return np.stack([reference.to_parameter(block) for block in blocks])
