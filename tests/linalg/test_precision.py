"""Global settings that let torch round products, and autocast, do not reach what must be exact."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asteria.linalg import precision
from asteria.linalg.eigenbasis import is_orthogonal, orthogonal_iteration
from asteria.linalg.ldlr import ldlr
from asteria.linalg.precision import exact_bmm, without_autocast
from asteria.linalg.rotated import conjugated, rotated_ldlr, turn
from tests.linalg.matrices import defect, generator, geometric, rotations, with_spectrum

SIZE = 64  # oneDNN takes products of at least 16^3 multiplications


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that makes use of every permission to round."""
    monkeypatch.setattr(precision, "_host_rounds", lambda setting: True)


@contextlib.contextmanager
def allowed(level: str) -> Iterator[None]:
    """Like a training script that lets torch round."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Products(TorchDispatchMode):
    """Dtypes of all products of matrices whose inputs torch may round."""

    def __init__(self) -> None:
        super().__init__()
        self.float32: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            self.float32 += [name] * (args[0].dtype == torch.float32)
        return func(*args, **(kwargs or {}))


def pair(size: int = SIZE) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, 3, size, size, generator=generator(0))
    return first, second


def problem() -> tuple[Tensor, Tensor]:
    vectors = rotations(2, SIZE, 1)
    noise = torch.randn(vectors.shape, generator=generator(5), dtype=torch.float64)
    basis = torch.linalg.qr(vectors + 0.01 * noise).Q
    factor = with_spectrum(geometric(SIZE, 0.85), vectors, torch.float32)
    return factor, basis.float().mT.contiguous().mT


def test_a_processor_that_does_not_round_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_host_rounds", lambda setting: False)
    with allowed("medium"), Products() as products:
        exact_bmm(*pair())
    assert products.float32 == ["bmm"]


def test_whether_the_processor_rounds_is_what_it_does() -> None:
    first, second = pair()
    exact = torch.bmm(first, second)
    with allowed("medium"):
        precision._host_rounds.cache_clear()
        rounds = precision._host_rounds("medium")
        assert rounds == bool((torch.bmm(first, second) - exact).abs().max() > 1e-3)
    precision._host_rounds.cache_clear()
    assert not precision._host_rounds("highest")


@pytest.mark.parametrize("level", ["high", "medium"])
def test_an_exact_product_is_as_good_as_without_the_permission(level: str) -> None:
    first, second = pair()
    wanted = first.double() @ second.double()
    plain = exact_bmm(first, second)
    assert torch.equal(plain, torch.bmm(first, second))
    with allowed(level):
        found = exact_bmm(first, second)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max()


def test_float64_needs_no_care() -> None:
    first, second = (x.double() for x in pair())
    with allowed("medium"):
        assert torch.equal(exact_bmm(first, second), torch.bmm(first, second))


@pytest.mark.parametrize("level", ["high", "medium"])
def test_a_qr_refresh_has_no_product_that_may_be_rounded(level: str, rounding: None) -> None:
    factor, basis = problem()
    with allowed(level), Products() as products:
        orthogonal_iteration(factor, basis, sort=True)
    assert products.float32 == []


def test_an_ldlr_refresh_lets_only_its_correction_be_rounded(rounding: None) -> None:
    factor, basis = problem()
    with allowed("medium"), Products() as products:
        ldlr(factor, basis, sort=True)
    assert products.float32 == ["baddbmm"]


def test_a_factor_in_its_basis_lets_only_corrections_be_rounded(rounding: None) -> None:
    factor, basis = problem()
    rotated = (basis.double().mT @ factor.double() @ basis.double()).float()
    with allowed("medium"), Products() as products:
        fresh = rotated_ldlr(rotated, basis, sort=True).basis
        by = turn(basis, fresh)
        assert products.float32 == ["baddbmm"]
        followed = conjugated(rotated, by)
    assert products.float32 == ["baddbmm"] * 3
    assert defect(fresh) < 1e-5
    wanted = fresh.double().mT @ factor.double() @ fresh.double()
    assert (followed - wanted).abs().max() < 2**-8 * (followed - rotated).abs().max()


@pytest.mark.parametrize("refresh", [ldlr, orthogonal_iteration])
def test_a_refresh_is_the_same_to_rounding_errors_of_float32(refresh) -> None:
    factor, basis = problem()
    wanted = refresh(factor.double(), basis.double(), sort=True).basis
    usual = refresh(factor, basis, sort=True).basis
    with allowed("medium"):
        found = refresh(factor, basis, sort=True)
    assert found.usable.all()
    assert defect(found.basis) < 1e-5
    # The correction may have been rounded to bfloat16: it is small, and so is its rounding.
    signs = torch.sign((found.basis * wanted).sum(-2, keepdim=True))
    off = (found.basis * signs - wanted).abs().max()
    share = 2**-8 if refresh is ldlr else 0.0
    moved = (usual - basis).abs().max() if refresh is ldlr else 0.0
    assert off <= 1e-4 + share * moved


def test_the_check_of_orthogonality_does_not_find_the_rounding() -> None:
    basis = rotations(2, 128, 1, torch.float32)
    with allowed("medium"):
        assert is_orthogonal(basis).tolist() == [True, True]


@pytest.mark.parametrize("setting", ["tf32", "bf16"])
def test_settings_of_single_backends_are_noticed(setting: str, rounding: None) -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has none")
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        with Products() as products:
            exact_bmm(*pair())
    finally:
        matmul.fp32_precision = before
    assert products.float32 == []


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_goes_by_its_own_setting(kind: str) -> None:
    device = torch.device(kind)
    assert not precision._may_round(device)
    with allowed("high"):
        assert precision._may_round(device)
    assert not precision._may_round(device)


def test_the_setting_of_older_versions_of_torch_is_asked_where_there_is_no_other() -> None:
    assert precision._setting(object()) == "highest"
    with allowed("medium"):
        assert precision._setting(object()) == "medium"


def tf32(x: Tensor) -> Tensor:
    """What tensor cores make of a float32."""
    return x.view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32)


def test_parts_for_an_accelerator_survive_its_rounding() -> None:
    first, second = pair()
    wanted = first.double() @ second.double()
    product = 0.0
    parts = [precision._parts(x) for x in (first, second)]
    for one, other in ((0, 0), (0, 1), (1, 0)):
        a, b = parts[0][one], parts[1][other]
        assert one or torch.equal(tf32(a), a), "the leading part has nothing to be rounded"
        product = product + tf32(a).double() @ tf32(b).double()
    assert (product - wanted).abs().max() < 1e-5
    rounded = tf32(first).double() @ tf32(second).double()
    assert (rounded - wanted).abs().max() > 1e-3


def test_an_accelerator_multiplies_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an accelerator, taken on the host."""
    first, second = pair()
    monkeypatch.setattr(precision, "_may_round", lambda device: True)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    found = exact_bmm(first, second)
    assert (found - first.double() @ second.double()).abs().max() < 1e-4


def test_autocast_is_off_where_a_step_computes() -> None:
    first, second = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.bmm(first, second).dtype == torch.bfloat16
        with without_autocast([torch.device("cpu"), torch.device("meta")]):
            assert torch.equal(torch.bmm(first, second), first @ second)
            assert torch.bmm(first, second).dtype == torch.float32
        assert torch.bmm(first, second).dtype == torch.bfloat16


def test_other_defaults_hide_no_rounding() -> None:
    """Whether this processor rounds is found out in float32 and on the host."""
    found = []
    try:
        for dtype, device in (
            (torch.float32, "cpu"),
            (torch.float64, "cpu"),
            (torch.float32, "meta"),
        ):
            precision._host_rounds.cache_clear()
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            with allowed("medium"):
                found.append(precision._host_rounds("medium"))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        precision._host_rounds.cache_clear()
    assert len(set(found)) == 1
