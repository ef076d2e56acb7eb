"""Orthogonal iteration by its definition, its limit, and on factors that are hard."""

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import is_orthogonal, orthogonal_iteration
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


def published(factor: Tensor, basis: Tensor) -> Tensor:
    """One block: sort the columns, iterate, factorize; here put back where they stood."""
    estimates = torch.diag(basis.T @ factor @ basis)
    order = torch.argsort(estimates, descending=True)
    fresh, _ = torch.linalg.qr(factor @ basis[:, order])
    return fresh[:, torch.argsort(order)]


@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_unsorted_it_is_the_qr_of_the_product(size: int) -> None:
    factor = with_spectrum(geometric(size, 0.8), rotations(3, size, 1))
    basis = rotations(3, size, 2)
    before = factor.clone(), basis.clone()
    result = orthogonal_iteration(factor, basis, sort=False)
    assert_usable(result, factor)
    torch.testing.assert_close(result.basis, torch.linalg.qr(factor @ basis).Q)
    assert torch.equal(factor, before[0])
    assert torch.equal(basis, before[1])


@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_sorted_it_is_the_published_rule_with_the_columns_put_back(size: int) -> None:
    factor = with_spectrum(geometric(size, 0.8), rotations(3, size, 1))
    basis = rotations(3, size, 2)
    result = orthogonal_iteration(factor, basis, sort=True)
    assert_usable(result, factor)
    wanted = torch.stack([published(factor[block], basis[block]) for block in range(3)])
    torch.testing.assert_close(result.basis, wanted)
    if size == 24:
        unsorted = orthogonal_iteration(factor, basis, sort=False).basis
        assert (unsorted - wanted).abs().max() > 0.1, "the order must matter here"


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_it_converges_to_the_eigenvectors(dtype: torch.dtype, sort: bool) -> None:
    vectors = rotations(2, 10, seed=4)
    factor = with_spectrum(geometric(10, 0.6), vectors, dtype)
    basis = rotations(2, 10, seed=5, dtype=dtype)
    for _ in range(100):
        basis = orthogonal_iteration(factor, basis, sort=sort).basis
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    overlaps = (vectors.mT @ basis.double()).abs()
    assert overlaps.amax(-1).min() > 1 - tolerance, "every eigenvector has a column"
    assert overlaps.amax(-2).min() > 1 - tolerance, "every column has an eigenvector"
    assert defect(basis) <= ORTHOGONAL[dtype]


def test_sorted_columns_follow_their_eigenvectors() -> None:
    vectors = rotations(2, 10, seed=4)
    factor = with_spectrum(geometric(10, 0.6), vectors)
    wanted = vectors[..., torch.randperm(10, generator=generator(3))]
    noise = 0.02 * torch.randn(2, 10, 10, generator=generator(1), dtype=torch.float64)
    basis = torch.linalg.qr(wanted + noise).Q
    for _ in range(40):
        basis = orthogonal_iteration(factor, basis, sort=True).basis
    assert overlap(basis, wanted).min() > 1 - 1e-9


def test_sorted_the_leading_column_takes_a_pure_power_step_wherever_it_stands() -> None:
    factor = with_spectrum(geometric(8, 0.5), rotations(1, 8, seed=6))
    basis = rotations(1, 8, seed=7)
    image = factor @ basis
    top = int((basis * image).sum(-2).argmax())
    assert top > 0, "another column stands first"
    power = image[0, :, top] / image[0, :, top].norm()
    kept = orthogonal_iteration(factor, basis, sort=True).basis[0, :, top]
    lost = orthogonal_iteration(factor, basis, sort=False).basis[0, :, top]
    assert float((kept @ power).abs()) > 1 - 1e-12
    assert float((lost @ power).abs()) < 0.9


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_factors_have_usable_bases(name: str, dtype: torch.dtype, sort: bool) -> None:
    factor = hard_factors(dtype)[name]
    basis = rotations(2, factor.shape[-1], seed=8, dtype=dtype)
    for _ in range(5):
        result = orthogonal_iteration(factor, basis, sort=sort)
        assert_usable(result, factor)
        basis = result.basis


def test_the_identity_turns_nothing() -> None:
    basis = rotations(2, 6, seed=8)
    factor = torch.eye(6, dtype=torch.float64).expand(2, 6, 6).contiguous()
    fresh = orthogonal_iteration(factor, basis, sort=True).basis
    assert overlap(fresh, basis).min() > 1 - 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_factor_is_marked_and_its_neighbours_are_not(
    dtype: torch.dtype, sort: bool, bad: float
) -> None:
    factor = with_spectrum(geometric(6, 0.8), rotations(3, 6, 1), dtype)
    basis = rotations(3, 6, 2, dtype)
    clean = orthogonal_iteration(factor, basis, sort=sort).basis
    factor[1, 4, 2] = bad
    result = orthogonal_iteration(factor, basis, sort=sort)
    assert result.usable.tolist() == [True, False, True]
    assert torch.equal(result.basis[0], clean[0])
    assert torch.equal(result.basis[2], clean[2])


def broken(basis: Tensor, how: str) -> Tensor:
    basis = basis.clone()
    if how == "scaled":
        basis *= 1.01
    elif how == "one column scaled":
        basis[:, -1] *= 2
    elif how == "column twice":
        basis[:, 0] = basis[:, 1]
    elif how == "zero column":
        basis[:, 0] = 0
    elif how == "zero":
        basis.zero_()
    else:
        basis[0, -1] = float(how)
    return basis


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 17, 128, 512])
@pytest.mark.parametrize(
    "how",
    ["scaled", "one column scaled", "column twice", "zero column", "zero", "nan", "inf", "1e30"],
)
def test_broken_bases_are_found_out_and_their_neighbours_pass(
    how: str, size: int, dtype: torch.dtype
) -> None:
    bases = rotations(3, size, seed=size, dtype=dtype)
    bases[1] = broken(bases[1], how)
    assert is_orthogonal(bases).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [1, 2, 3, 16, 100, 256, 512])
def test_what_float32_householder_leaves_is_accepted(size: int) -> None:
    normal = torch.randn(2, size, size, generator=generator(size))
    basis = torch.linalg.qr(normal).Q
    assert is_orthogonal(basis).tolist() == [True, True]
    flipped = basis.flip(-1) * -1
    assert is_orthogonal(flipped).tolist() == [True, True]


@pytest.mark.parametrize("size", [1, 2, 16, 128, 512])
@pytest.mark.parametrize(("stretch", "passes"), [(1e-4, True), (-1e-4, True), (2e-3, False)])
def test_the_bound_is_relative_to_the_root_of_the_size(
    size: int, stretch: float, passes: bool
) -> None:
    """Q (1 + d) is off by 2 d sqrt(n), the bound is 1e-3 sqrt(n); eight probes estimate it."""
    if size == 1:
        stretch *= 0.1 if passes else 10  # there eight probes are few
    bases = (1 + stretch) * rotations(2, size, seed=size)
    assert is_orthogonal(bases).tolist() == [passes, passes]


def test_the_check_gives_the_same_answer_every_time() -> None:
    state = torch.random.get_rng_state()
    basis = rotations(2, 16, seed=1)
    assert is_orthogonal(basis).tolist() == is_orthogonal(basis).tolist()
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers are kept"
