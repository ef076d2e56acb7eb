"""Exact eigenbases: true, sorted, in float64, and a failure of one block stays its own."""

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import eigh_basis, matched_eigh_basis
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
LinAlgError = torch.linalg.LinAlgError
true_eigh = torch.linalg.eigh


def factor_of(blocks: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return with_spectrum(geometric(size, 0.7), rotations(blocks, size, seed), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_the_columns_are_eigenvectors_the_largest_first(size: int, dtype: torch.dtype) -> None:
    vectors = rotations(3, size, seed=size)
    factor = with_spectrum(geometric(size, 0.7), vectors, dtype)
    before = factor.clone()
    result = eigh_basis(factor)
    assert_usable(result, factor)
    assert torch.equal(factor, before)
    assert overlap(result.basis, vectors).min() > 1 - (1e-5 if dtype == torch.float32 else 1e-12)
    turned = result.basis.double().mT @ factor.double() @ result.basis.double()
    values = turned.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(values, torch.tensor([geometric(size, 0.7)] * 3).double())
    assert (turned - torch.diag_embed(values)).abs().max() < 10 * ORTHOGONAL[dtype]


def test_float32_factors_are_solved_in_float64() -> None:
    factor = factor_of(2, 16, torch.float32)
    wanted = true_eigh(factor.double()).eigenvectors.flip(-1).float()
    assert torch.equal(eigh_basis(factor).basis, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_factors_have_usable_bases(name: str, dtype: torch.dtype) -> None:
    factor = hard_factors(dtype)[name]
    assert_usable(eigh_basis(factor), factor)
    start = rotations(2, factor.shape[-1], dtype=dtype)
    assert_usable(matched_eigh_basis(factor, start), factor)


@pytest.mark.parametrize("name", ["rank one", "condition 1e12", "tiny", "huge"])
def test_the_leading_direction_of_a_hard_factor_is_found(name: str) -> None:
    leading = rotations(2, 12, seed=9)
    for dtype in DTYPES:
        basis = eigh_basis(hard_factors(dtype)[name]).basis
        assert overlap(basis, leading)[:, 0].min() > 1 - 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_factor_is_marked_and_its_neighbours_are_not(
    dtype: torch.dtype, bad: float
) -> None:
    factor = factor_of(3, 6, dtype)
    clean = eigh_basis(factor).basis
    factor[1, 2, 3] = bad
    result = eigh_basis(factor)
    assert result.usable.tolist() == [True, False, True]
    assert torch.equal(result.basis[0], clean[0])
    assert torch.equal(result.basis[2], clean[2])
    assert torch.equal(result.basis[1], torch.eye(6, dtype=dtype))


def test_no_convergence_is_a_value_and_stays_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = factor_of(3, 6, torch.float32)
    clean = eigh_basis(factor).basis

    def stubborn(matrix: Tensor) -> object:
        if torch.equal(matrix, factor[2].double()):
            raise LinAlgError("failed to converge")
        return true_eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    result = eigh_basis(factor)
    assert result.usable.tolist() == [True, True, False]
    assert torch.equal(result.basis[:2], clean[:2])
    assert torch.equal(result.basis[2], torch.eye(6))
    start = rotations(3, 6, dtype=torch.float32)
    assert matched_eigh_basis(factor, start).usable.tolist() == [True, True, False]


def test_what_a_solver_returns_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = factor_of(2, 6, torch.float64)

    def sloppy(matrix: Tensor) -> torch.return_types.linalg_eigh:
        found = true_eigh(matrix)
        if torch.equal(matrix, factor[0]):
            found.eigenvectors[:, 0] = found.eigenvectors[:, 1]
        return found

    monkeypatch.setattr(torch.linalg, "eigh", sloppy)
    assert eigh_basis(factor).usable.tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matched_columns_stay_where_they_stood(dtype: torch.dtype) -> None:
    vectors = rotations(2, 9, seed=3)
    factor = with_spectrum(geometric(9, 0.7), vectors, dtype)
    order = torch.randperm(9, generator=generator(0))
    noise = 0.02 * torch.randn(2, 9, 9, generator=generator(1), dtype=torch.float64)
    basis = torch.linalg.qr(vectors[..., order] + noise).Q.to(dtype)
    result = matched_eigh_basis(factor, basis)
    assert_usable(result, factor)
    assert overlap(result.basis, vectors[..., order]).min() > 1 - 1e-5


def test_columns_are_matched_by_rank_of_the_rayleigh_quotient() -> None:
    factor = factor_of(2, 7, torch.float64)
    basis = rotations(2, 7, seed=11)
    fresh, matched = eigh_basis(factor).basis, matched_eigh_basis(factor, basis).basis
    for block in range(2):
        quotients = [float(q @ factor[block] @ q) for q in basis[block].T]
        ranked = sorted(range(7), key=lambda column: -quotients[column])
        for rank, column in enumerate(ranked):
            assert torch.equal(matched[block, :, column], fresh[block, :, rank])
    assert defect(matched) <= ORTHOGONAL[torch.float64]


def test_a_block_without_a_match_is_marked_and_its_neighbours_are_not() -> None:
    factor, basis = factor_of(3, 6, torch.float64), rotations(3, 6, seed=2)
    clean = matched_eigh_basis(factor, basis).basis
    factor[0, 0, 0] = float("nan")
    result = matched_eigh_basis(factor, basis)
    assert result.usable.tolist() == [False, True, True]
    assert torch.equal(result.basis[1:], clean[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_zeros_has_the_identity_without_a_solver(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = factor_of(3, 4, dtype)
    factor[1].zero_()
    solved: list[Tensor] = []

    def counting(matrix: Tensor) -> object:
        solved.append(matrix)
        return true_eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    result = eigh_basis(factor)
    assert len(solved) == 2
    assert result.usable.all()
    assert torch.equal(result.basis[1], torch.eye(4, dtype=dtype))
