"""LDLR: the QR of orthogonal iteration without a QR, where it is easy and where it is not."""

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import orthogonal_iteration
from asteria.linalg.ldlr import elimination, ldlr, orthonormalized
from tests.linalg.matrices import (
    ORTHOGONAL,
    assert_usable,
    defect,
    generator,
    geometric,
    hard_factors,
    overlap,
    rotations,
    with_spectrum,
)

DTYPES = [torch.float32, torch.float64]
HARD = sorted(hard_factors(torch.float64))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the sines of the angles between columns."""
    return float((1 - overlap(found, wanted).square()).clamp_min(0).mean().sqrt())


def tilted(vectors: Tensor, angle: float, seed: int = 77) -> Tensor:
    """Bases whose columns are that far, on average, from ``vectors``."""
    noise = torch.randn(vectors.shape, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(vectors + angle / vectors.shape[-1] ** 0.5 * noise).Q


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_it_is_orthogonal_iteration_but_for_signs(size: int, sort: bool) -> None:
    vectors = rotations(3, size, 1)
    factor = with_spectrum(geometric(size, 0.8), vectors)
    basis = tilted(vectors, 0.5)
    before = factor.clone(), basis.clone()
    wanted = orthogonal_iteration(factor, basis, sort=sort).basis
    result = ldlr(factor, basis, sort=sort)
    assert_usable(result, factor)
    assert (overlap(result.basis, wanted) - 1).abs().max() < 1e-12
    assert overlap(basis, wanted).min() < 0.999 or size == 1, "there was something to do"
    assert torch.equal(factor, before[0])
    assert torch.equal(basis, before[1])


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_float32_costs_it_as_much_as_it_costs_the_qr(condition: float) -> None:
    size = 48
    vectors = rotations(4, size, 1)
    factor = with_spectrum(geometric(size, condition ** (-1 / (size - 1))), vectors, torch.float32)
    basis = tilted(vectors, 0.02).float()
    exact = orthogonal_iteration(factor.double(), basis.double(), sort=True).basis
    ours = distance(ldlr(factor, basis, sort=True).basis, exact)
    qr = distance(orthogonal_iteration(factor, basis, sort=True).basis, exact)
    assert ours < 1.5 * qr + 1e-6
    assert distance(basis, exact) > 10 * ours, "there was something to do"


@pytest.mark.parametrize("iterations", [2, 3])
def test_several_iterations_are_worth_as_many_qr(iterations: int) -> None:
    vectors = rotations(2, 32, 1)
    factor = with_spectrum(geometric(32, 0.7), vectors)
    basis = tilted(vectors, 0.001)
    steps = [basis]
    for _ in range(iterations):
        steps.append(orthogonal_iteration(factor, steps[-1], sort=True).basis)
    result = ldlr(factor, basis, sort=True, iterations=iterations)
    assert_usable(result, factor)
    assert distance(result.basis, steps[-1]) < 0.1 * distance(steps[-2], steps[-1])


def test_far_from_the_eigenbasis_several_iterations_are_one() -> None:
    factor = with_spectrum(geometric(32, 0.7), rotations(2, 32, 1))
    basis = rotations(2, 32, 2)
    one = ldlr(factor, basis, sort=True).basis
    assert torch.equal(ldlr(factor, basis, sort=True, iterations=2).basis, one)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_it_converges_to_the_eigenvectors(dtype: torch.dtype, iterations: int) -> None:
    vectors = rotations(2, 10, seed=4)
    factor = with_spectrum(geometric(10, 0.6), vectors, dtype)
    basis = rotations(2, 10, seed=5, dtype=dtype)
    for _ in range(100):
        basis = ldlr(factor, basis, sort=True, iterations=iterations).basis
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    overlaps = (vectors.mT @ basis.double()).abs()
    assert overlaps.amax(-1).min() > 1 - tolerance, "every eigenvector has a column"
    assert overlaps.amax(-2).min() > 1 - tolerance, "every column has an eigenvector"
    assert defect(basis) <= ORTHOGONAL[dtype]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_factors_have_usable_bases(name: str, dtype: torch.dtype, sort: bool) -> None:
    factor = hard_factors(dtype)[name]
    basis = rotations(2, factor.shape[-1], seed=8, dtype=dtype)
    for _ in range(5):
        result = ldlr(factor, basis, sort=sort)
        assert result.usable.tolist() == [True, True]
        assert defect(result.basis) <= 100 * ORTHOGONAL[dtype]
        basis = result.basis


@pytest.mark.parametrize("rank", [1, 4, 24, 47])
def test_the_leading_space_of_a_singular_factor_is_found_as_by_qr(rank: int) -> None:
    """Where rounding leaves Q^T L Q indefinite: what is above the rounding gets its step."""
    vectors = rotations(8, 48, 3)
    factor = with_spectrum([1.0] * rank + [0.0] * (48 - rank), vectors, torch.float32)
    basis = rotations(8, 48, seed=8, dtype=torch.float32)
    for _ in range(3):
        basis = ldlr(factor, basis, sort=True).basis
    # Both put the whole factor into as many columns as it has rank.
    quotients = (basis * (factor @ basis)).sum(-2).sort(-1, descending=True).values
    assert quotients[:, :rank].min() > 0.999
    assert quotients[:, rank:].max() < 1e-3


def test_what_no_shift_makes_definite_takes_the_first_order_step() -> None:
    rotated = torch.tensor([[[1.0, 0.5], [0.5, -0.5]], [[1.0, 0.5], [0.5, 0.5]]])
    found = elimination(rotated)
    torch.testing.assert_close(found[0], torch.tensor([[0.0, -0.5], [0.5, 0.0]]))
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 0.0], [0.5, 0.0]]))


def test_a_basis_that_is_not_orthogonal_any_more_is_repaired() -> None:
    vectors = rotations(2, 16, 1)
    factor = with_spectrum(geometric(16, 0.8), vectors, torch.float32)
    basis = (1.02 * vectors).float()
    basis[..., 3] += 0.02
    assert defect(basis) > 0.03
    assert_usable(ldlr(factor, basis, sort=True), factor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_factor_is_marked_and_its_neighbours_are_not(
    dtype: torch.dtype, sort: bool, bad: float
) -> None:
    vectors = rotations(3, 6, 1)
    factor, basis = with_spectrum(geometric(6, 0.8), vectors, dtype), tilted(vectors, 0.1).to(dtype)
    clean = ldlr(factor, basis, sort=sort).basis
    factor[1, 4, 2] = bad
    result = ldlr(factor, basis, sort=sort)
    assert result.usable.tolist() == [True, False, True]
    assert torch.equal(result.basis[0], clean[0])
    assert torch.equal(result.basis[2], clean[2])


@pytest.mark.parametrize("sort", [False, True])
def test_bases_come_column_after_column_in_memory(sort: bool) -> None:
    factor = with_spectrum(geometric(6, 0.8), rotations(2, 6, 1))
    assert ldlr(factor, rotations(2, 6, 2), sort=sort).basis.mT.is_contiguous()


def test_nothing_is_read_back_from_a_device() -> None:
    """Tensors without values stand in for those whose values the host must not ask for."""
    rotated = torch.empty(2, 5, 5, device="meta")
    correction = elimination(rotated, iterations=2)
    assert orthonormalized(rotated, correction).shape == rotated.shape
