"""``refresh_method="ldlr"``: the trajectory of QR refreshes, and what happens where it fails."""

import contextlib
import warnings

import pytest
import torch
from torch import Tensor

from asteria import RuntimeConfig
from asteria.linalg import method as methods
from asteria.linalg import verified
from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.method import Method, chosen_method
from asteria.linalg.verified import verified_refresh
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.linalg.matrices import defect, geometric, rotations, with_spectrum
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.asynchronous import build
from tests.support.tolerances import SAME_MATH
from tests.support.training import assert_near, assert_same_bits, parameters, train, weights

SQUARES = [(4, 4), (8, 8), (5,)]


def trained(name: str, runtime: RuntimeConfig, dtype: torch.dtype) -> SecondOrderOptimizer:
    given = {"lr": 2.0**-6, "precondition_frequency": 1, "shampoo_beta": 0.5}
    optimizer = OPTIMIZERS[name](parameters(SQUARES, dtype), runtime=runtime, **given)
    with contextlib.closing(optimizer):
        train(optimizer, range(30))
        optimizer.state_dict()
    return optimizer


@over_optimizers
def test_it_is_the_trajectory_of_qr(name: str) -> None:
    found, wanted = (
        trained(name, RuntimeConfig(refresh="sync", refresh_method=method), torch.float64)
        for method in ("ldlr", "qr")
    )
    params = found.param_groups[0]["params"]
    assert_near(
        weights(params), weights(wanted.param_groups[0]["params"]), SAME_MATH, torch.float64
    )
    assert found.stats().retried_refreshes == 0


@over_optimizers
def test_without_staleness_asynchronous_is_synchronous(name: str) -> None:
    runtime = {"refresh_method": "ldlr"}
    found = trained(name, RuntimeConfig(staleness=0, **runtime), torch.float32)
    wanted = trained(name, RuntimeConfig(refresh="sync", **runtime), torch.float32)
    assert_same_bits(
        weights(found.param_groups[0]["params"]), weights(wanted.param_groups[0]["params"])
    )


@over_optimizers
def test_workers_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Method] = []
    real = verified.refreshed

    def listening(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> BasisResult:
        asked.append(method)
        return real(factor, basis, method=method, sort=sort)

    monkeypatch.setattr(verified, "refreshed", listening)
    with contextlib.closing(build(name, RuntimeConfig(refresh_method="ldlr"))) as optimizer:
        train(optimizer, range(30))
        assert optimizer.stats().installs > 20
    assert set(asked) == {"ldlr"}


class Failing:
    """An LDLR refresh that comes to nothing in some dtypes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
        self.calls: list[torch.dtype] = []
        self._dtypes, self._real = dtypes, methods.ldlr
        monkeypatch.setattr(methods, "ldlr", self)

    def __call__(self, factor: Tensor, basis: Tensor, **options: object) -> BasisResult:
        self.calls.append(factor.dtype)
        result = self._real(factor, basis, **options)
        if factor.dtype not in self._dtypes:
            return result
        return BasisResult(result.basis * float("nan"), torch.zeros_like(result.usable))


def problem() -> tuple[Tensor, Tensor]:
    factor = with_spectrum(geometric(8, 0.5), rotations(2, 8, 1), torch.float32)
    return factor, rotations(2, 8, 2, torch.float32)


def test_a_failure_is_repeated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, basis = problem()
    expected = verified_refresh(factor, basis, method="ldlr", sort=True).basis
    failing = Failing(monkeypatch, torch.float32)
    outcome = verified_refresh(factor, basis, method="ldlr", sort=True)
    assert failing.calls == [torch.float32, torch.float64, torch.float64]
    assert (outcome.failures.kept, outcome.failures.retried) == ({}, 2)
    torch.testing.assert_close(outcome.basis, expected, rtol=0, atol=1e-5)


def test_a_failure_in_float64_too_is_left_to_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, basis = problem()
    exact = verified_refresh(factor.double(), basis.double(), method="qr", sort=True).basis
    Failing(monkeypatch, torch.float32, torch.float64)
    outcome = verified_refresh(factor, basis, method="ldlr", sort=True)
    assert (outcome.failures.kept, outcome.failures.retried) == ({}, 2)
    assert torch.equal(outcome.basis, exact.float())


def test_where_all_fail_the_basis_in_use_is_kept() -> None:
    factor, basis = problem()
    factor[1, 2, 2] = float("nan")
    outcome = verified_refresh(factor, basis, method="ldlr", sort=True)
    assert outcome.failures.kept == {1: "nonfinite factor"}
    assert torch.equal(outcome.basis[1], basis[1])
    assert defect(outcome.basis[:1]) < 1e-5


@over_optimizers
def test_what_float64_mends_is_only_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = trained(
            name, RuntimeConfig(refresh="sync", refresh_method="ldlr"), torch.float32
        )
    stats = optimizer.stats()
    assert stats.retried_refreshes == stats.refreshes - 4 > 50, "all but the first ones"
    assert stats.failed_refreshes == 0


@pytest.mark.parametrize(
    ("configured", "start", "first", "method"),
    [
        ("auto", "fresh", True, "qr"),
        ("qr", "adam", False, "qr"),
        ("ldlr", "fresh", True, "ldlr"),
        ("ldlr", "adam", True, "eigh"),
        ("ldlr", "adam", False, "ldlr"),
        ("eigh", "fresh", False, "eigh"),
    ],
)
def test_which_method_is_used(configured: str, start: str, first: bool, method: str) -> None:
    assert chosen_method(configured, start=start, first=first) == method
