"""Factors kept in their eigenbasis: the same refreshes, with more digits and fewer products."""

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.ldlr import ldlr
from asteria.linalg.rotated import (
    conjugated,
    in_basis,
    out_of_basis,
    rotated_eigh,
    rotated_ldlr,
    turn,
)
from benchmarks.refresh_trackers import Rounding
from tests.linalg.matrices import defect, generator, geometric, overlap, rotations, with_spectrum


def start(
    size: int = 24, ratio: float = 0.8, tilt: float = 0.02, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, bases near theirs, and the factors in these."""
    vectors = rotations(3, size, 1)
    noise = torch.randn(vectors.shape, generator=generator(77), dtype=torch.float64)
    basis = torch.linalg.qr(vectors + tilt * noise).Q
    factor = with_spectrum(geometric(size, ratio), vectors)
    rotated = basis.mT @ factor @ basis
    return factor.to(dtype), basis.to(dtype), rotated.to(dtype)


def turned(rotated: Tensor, basis: Tensor) -> tuple[BasisResult, Tensor]:
    """A refresh by LDLR, and the factor that follows."""
    found = rotated_ldlr(rotated, basis, sort=True)
    return found, conjugated(rotated, turn(basis, found.basis))


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("sort", [False, True])
def test_it_is_ldlr_of_the_factor(sort: bool, iterations: int) -> None:
    factor, basis, rotated = start()
    before = basis.clone(), rotated.clone()
    wanted = ldlr(factor, basis, sort=sort, iterations=iterations).basis
    found = rotated_ldlr(rotated, basis, sort=sort, iterations=iterations)
    by = turn(basis, found.basis)
    assert found.usable.tolist() == [True] * 3
    torch.testing.assert_close(found.basis, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.basis, basis @ by)
    torch.testing.assert_close(conjugated(rotated, by), found.basis.mT @ factor @ found.basis)
    assert found.basis.mT.is_contiguous()
    assert torch.equal(basis, before[0])
    assert torch.equal(rotated, before[1])


def test_the_exact_one_ends_with_a_diagonal_and_turns_no_more_than_it_must() -> None:
    factor, basis, rotated = start()
    found = rotated_eigh(rotated, basis)
    by = turn(basis, found.basis)
    followed = conjugated(rotated, by)
    assert found.usable.tolist() == [True] * 3
    off = followed - torch.diag_embed(followed.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-12
    torch.testing.assert_close(followed, found.basis.mT @ factor @ found.basis)
    assert overlap(found.basis, basis).min() > 0.9
    assert by.diagonal(dim1=-2, dim2=-1).min() > 0


def test_coordinates_change_back_and_forth() -> None:
    factor, basis, rotated = start()
    torch.testing.assert_close(in_basis(factor, basis), rotated)
    torch.testing.assert_close(out_of_basis(rotated, basis), factor)
    assert torch.equal(in_basis(factor, basis), in_basis(factor, basis).mT)


@pytest.mark.parametrize("place", [(4, 2), (2, 4)])
@pytest.mark.parametrize(
    "refresh", [lambda b, q: rotated_ldlr(b, q, sort=False), rotated_eigh], ids=["ldlr", "eigh"]
)
def test_a_non_finite_factor_is_marked_and_its_neighbours_are_not(
    refresh, place: tuple[int, int]
) -> None:
    """Whichever triangle is looked at."""
    _, basis, rotated = start(6)
    clean = refresh(rotated, basis)
    rotated[(1, *place)] = float("nan")
    found = refresh(rotated, basis)
    assert found.usable.tolist() == [True, False, True]
    for block in (0, 2):
        assert torch.equal(found.basis[block], clean.basis[block])


def test_small_eigenvalues_survive_products_in_tf32() -> None:
    """Where L Q and Q^T L Q in TF32 lose what is below a thousandth of the largest."""
    factor, basis, rotated = start(32, 10 ** (-6 / 31), 3e-4, torch.float32)
    wanted = ldlr(factor.double(), basis.double(), sort=True).basis
    with Rounding("tf32"):
        ours, _ = turned(rotated, basis)
        theirs = ldlr(factor, basis, sort=True)
    assert ours.usable.all()
    assert overlap(ours.basis, wanted).min() > 0.999
    assert overlap(theirs.basis, wanted).min() < 0.9


@pytest.mark.parametrize("rounding", [None, "tf32"])
def test_it_does_not_drift(rounding: str | None) -> None:
    """Twelve time constants of a moving average; 3,000 steps are in the benchmark."""
    draw, size, beta = generator(3), 16, 0.9
    scales = torch.tensor(geometric(size, 0.7), dtype=torch.float64).sqrt().unsqueeze(-1)
    vectors = rotations(1, size, 4)
    factor = with_spectrum(geometric(size, 0.7), vectors)
    basis = vectors.float()
    rotated = torch.diag_embed(torch.tensor([geometric(size, 0.7)]))
    worst = []
    for _ in range(120):
        noise = torch.randn(1, size, size, generator=draw, dtype=torch.float64)
        gradient = vectors @ (scales * noise) / size**0.5
        factor = beta * factor + (1 - beta) * gradient @ gradient.mT
        with Rounding(rounding or "none"):
            projected = basis.mT @ gradient.float()
            rotated = beta * rotated + (1 - beta) * projected @ projected.mT
            found, rotated = turned(rotated, basis)
            basis = found.basis
        assert found.usable.all()
        true = basis.double().mT @ factor @ basis.double()
        unit = true.diagonal(dim1=-2, dim2=-1).rsqrt()
        scaled = (rotated - true) * unit.unsqueeze(-1) * unit.unsqueeze(-2)
        worst.append(float(scaled.abs().max()))
    bound = 2e-2 if rounding else 2e-4
    assert max(worst) < bound
    assert defect(basis) < (2e-3 if rounding else 1e-5)
    assert max(worst[-40:]) < 2 * max(worst[40:80]), "it does not grow"
