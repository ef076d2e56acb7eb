"""Stacks of matrices with known spectra, and how far a stack is from what it should be."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult

ORTHOGONAL = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Largest entry of |Q^T Q - I| allowed, by dtype."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotations(blocks: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random orthogonal matrices (blocks, size, size)."""
    return _rotations(blocks, size, seed).to(dtype, copy=True)


@functools.cache
def _rotations(blocks: int, size: int, seed: int) -> Tensor:
    normal = torch.randn(blocks, size, size, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(normal).Q


def with_spectrum(
    eigenvalues: Sequence[float], vectors: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Symmetric matrices V diag(eigenvalues) V^T of vectors (b, n, n)."""
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    product = (vectors.double() * spectrum) @ vectors.double().mT
    return ((product + product.mT) / 2).to(dtype)


def geometric(size: int, ratio: float) -> list[float]:
    """1, ratio, ratio^2, ..."""
    return [ratio**power for power in range(size)]


def hard_factors(dtype: torch.dtype, size: int = 12) -> dict[str, Tensor]:
    """Factors (2, size, size) that training produces and solvers dislike."""
    vectors = rotations(2, size, seed=9)
    condition = [10.0 ** (-12 * k / (size - 1)) for k in range(size)]
    half = [1.0] * (size // 2) + [0.0] * (size - size // 2)
    spectra = {
        "identity": [1.0] * size,
        "singular": half,
        "rank one": [1.0] + [0.0] * (size - 1),
        "condition 1e12": condition,
        "tiny": [1e-30 * value for value in geometric(size, 0.5)],
        "huge": [1e30 * value for value in geometric(size, 0.5)],
    }
    found = {name: with_spectrum(values, vectors, dtype) for name, values in spectra.items()}
    return found | {"zero": torch.zeros(2, size, size, dtype=dtype)}


def assert_usable(result: BasisResult, like: Tensor) -> None:
    """A new basis of the factor's shape and dtype, orthogonal, and marked so."""
    assert result.basis.shape == like.shape
    assert result.basis.dtype == like.dtype
    assert result.usable.dtype == torch.bool
    assert result.usable.tolist() == [True] * len(like)
    assert defect(result.basis) <= ORTHOGONAL[like.dtype]


def defect(basis: Tensor) -> float:
    """Largest entry of |Q^T Q - I|."""
    identity = torch.eye(basis.shape[-1], dtype=torch.float64)
    return float((basis.double().mT @ basis.double() - identity).abs().max())


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """|cosine| between the columns of two stacks, column by column: (b, n)."""
    return (found.double() * wanted.double()).sum(-2).abs()
