"""On a real accelerator that may round to TF32: what must be exact is."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import is_orthogonal
from asteria.linalg.method import Method, refreshed
from asteria.linalg.precision import exact_bmm
from asteria.linalg.rotated import conjugated, rotated_ldlr, turn
from tests.linalg.matrices import defect, generator, geometric, overlap, rotations, with_spectrum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
SIZE = 256


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def problem() -> tuple[Tensor, Tensor]:
    """Factors of condition 1e5 and bases near theirs, on the device."""
    vectors = rotations(2, SIZE, 1)
    noise = torch.randn(vectors.shape, generator=generator(5), dtype=torch.float64)
    basis = torch.linalg.qr(vectors + 1e-3 * noise).Q.float().mT.contiguous().mT
    factor = with_spectrum(geometric(SIZE, 10 ** (-5 / (SIZE - 1))), vectors, torch.float32)
    return factor.cuda(), basis.cuda()


def test_an_exact_product_is_as_good_as_float32() -> None:
    first, second = (torch.randn(2, SIZE, SIZE, generator=generator(n)).cuda() for n in (1, 2))
    wanted = first.double() @ second.double()
    plain = (exact_bmm(first, second) - wanted).abs().max()
    with tf32():
        found = (exact_bmm(first, second) - wanted).abs().max()
        rounded = (torch.bmm(first, second) - wanted).abs().max()
    assert found < 4 * plain
    assert rounded > 20 * plain, "this device does not round"


@pytest.mark.parametrize("method", ["qr", "ldlr"])
def test_a_refresh_is_orthogonal_and_keeps_small_eigenvalues(method: Method) -> None:
    """A triangular solve that rounded would show here, too."""
    factor, basis = problem()
    wanted = refreshed(factor.double(), basis.double(), method=method, sort=True).basis
    with tf32():
        found = refreshed(factor, basis, method=method, sort=True)
        assert is_orthogonal(found.basis).all()
    assert found.usable.all()
    assert defect(found.basis.cpu()) < 2e-5
    assert overlap(found.basis.cpu(), wanted.cpu()).min() > 0.999


def test_rotated_factors_survive_tf32() -> None:
    factor, basis = problem()
    rotated = (basis.double().mT @ factor.double() @ basis.double()).float()
    wanted = refreshed(factor.double(), basis.double(), method="ldlr", sort=True).basis
    with tf32():
        found = rotated_ldlr(rotated, basis, sort=True)
        followed = conjugated(rotated, turn(basis, found.basis))
    assert found.usable.all()
    true = found.basis.double().mT @ factor.double() @ found.basis.double()
    unit = true.diagonal(dim1=-2, dim2=-1).rsqrt()
    scaled = (followed - true) * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    assert scaled.abs().max() < 2e-2, "also of the small eigenvalues"
    assert defect(found.basis.cpu()) < 2e-5
    assert overlap(found.basis.cpu(), wanted.cpu()).min() > 0.999
