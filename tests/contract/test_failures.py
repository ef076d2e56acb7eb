"""Refreshes that fail: the basis in use stays in use, somebody is told, and training can go on."""

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import RefreshError, RuntimeConfig
from asteria.linalg import verified
from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.method import Method
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import launcher
from tests.support.arms import PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, bases, build, manual
from tests.support.execution import versions
from tests.support.training import (
    Shape,
    assert_same_bits,
    everything,
    same_bits,
    set_gradients,
    train,
)

ONE: list[Shape] = [(4, 4)]
Warned = list[warnings.WarningMessage]
Attempt = Callable[..., BasisResult]
_attempt: Attempt = verified._attempt


class Solver:
    """Stands where bases are attempted, and fails as it is told to."""

    def __init__(self) -> None:
        self.failure: Callable[[BasisResult, Tensor], BasisResult] | None = None
        self.in_float64_too = True
        self.dtypes: list[torch.dtype] = []

    def __call__(self, factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> BasisResult:
        """See `asteria.linalg.verified._attempt`."""
        self.dtypes.append(factor.dtype)
        result = _attempt(factor, basis, method=method, sort=sort)
        fails = factor.dtype != torch.float64 or self.in_float64_too
        return self.failure(result, factor) if self.failure and fails else result


def unusable(result: BasisResult, factor: Tensor) -> BasisResult:
    """What comes back is not orthogonal, and known not to be."""
    return BasisResult(result.basis * 2, torch.zeros_like(result.usable))


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    one = Solver()
    monkeypatch.setattr(verified, "_attempt", one)
    return one


@pytest.fixture
def warned() -> Iterator[Warned]:
    """Warnings so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def refusal(optimizer: SecondOrderOptimizer, kind: type[Exception]) -> Exception | None:
    """What a step raises, if so: having changed nothing, so that the next call works."""
    before = everything(optimizer)
    try:
        optimizer.step()
    except kind as error:
        assert_same_bits(everything(optimizer), before)
        optimizer.step()
        assert not same_bits(everything(optimizer)["0"], before["0"])
        return error
    return None


def grown(name: str, **runtime: Any) -> SecondOrderOptimizer:
    """One (4, 4) parameter; its workers do their jobs when the step waits for them."""
    optimizer, _ = manual(build(name, RuntimeConfig(**runtime), ONE))
    train(optimizer, range(GROWN + 3))
    return optimizer


def rounds(optimizer: SecondOrderOptimizer, count: int, first: int) -> None:
    """So many periods, in each of which one refresh lands."""
    train(optimizer, range(first, first + count * PERIOD))


@over_optimizers
def test_the_basis_in_use_stays_and_failures_are_counted(
    name: str, solver: Solver, warned: Warned
) -> None:
    optimizer = grown(name)
    assert optimizer.stats().failures == {}
    solver.failure = unusable
    before = bases(optimizer)
    rounds(optimizer, 3, GROWN + 3)
    stats = optimizer.stats()
    assert stats.failures["no basis"] == stats.failed_refreshes
    assert 4 <= stats.failed_refreshes <= 6
    for old, new in zip(before, bases(optimizer), strict=True):
        for key in old:
            assert same_bits(old[key], new[key])
    assert all(bool(value.isfinite().all()) for value in everything(optimizer).values())
    assert len(warned) == 1
    assert "a refresh of parameter 0 of group 0 failed (no basis)" in str(warned[0].message)
    solver.failure = None
    rounds(optimizer, 2, GROWN + 12)
    assert optimizer.stats().failed_refreshes == stats.failed_refreshes
    assert not same_bits(before[0]["basis_0"], bases(optimizer)[0]["basis_0"])


@over_optimizers
def test_a_solver_that_raises_is_a_failure_and_no_crash(
    name: str, monkeypatch: pytest.MonkeyPatch, warned: Warned
) -> None:
    optimizer = grown(name)

    def solve(*_: object, **__: object) -> BasisResult:
        raise torch.linalg.LinAlgError("no convergence")

    optimizer.state_dict()
    monkeypatch.setattr(verified, "refreshed", solve)
    before = bases(optimizer)
    rounds(optimizer, 3, GROWN + 3)
    assert optimizer.stats().failures.keys() == {"no basis"}
    assert len(warned) == 1
    # One more refresh than the failed ones has landed: the one that was done before.
    assert not all(same_bits(before[0][key], bases(optimizer)[0][key]) for key in before[0])


@over_optimizers
def test_what_is_not_orthogonal_is_found_out(
    name: str, monkeypatch: pytest.MonkeyPatch, warned: Warned
) -> None:
    """Also if the solver believes that all is well: the result is looked at."""
    optimizer = grown(name)
    optimizer.state_dict()
    orthonormalized = "asteria.linalg.eigenbasis._orthonormalized"
    monkeypatch.setattr(orthonormalized, lambda columns: columns + 1)
    rounds(optimizer, 2, GROWN + 3)
    stats = optimizer.stats()
    assert stats.failed_refreshes == 0
    assert stats.retried_refreshes >= 2, "float64 falls back to eigenvectors, which are sound"
    basis = bases(optimizer)[0]["basis_0"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4))
    assert len(warned) == 0


@over_optimizers
def test_float64_rescues_what_float32_cannot(name: str, solver: Solver, warned: Warned) -> None:
    optimizer = grown(name)
    optimizer.state_dict()
    before = optimizer.stats()
    assert before.retried_refreshes == 0
    solver.failure, solver.in_float64_too = unusable, False
    rounds(optimizer, 3, GROWN + 3)
    stats = optimizer.stats()
    assert 4 <= stats.retried_refreshes <= 6
    assert stats.failed_refreshes == 0
    assert torch.float64 in solver.dtypes
    assert bases(optimizer)[0]["basis_0"].dtype == torch.float32
    assert len(warned) == 0


@over_optimizers
def test_a_factor_that_is_not_finite_is_never_used(name: str, warned: Warned) -> None:
    optimizer = grown(name)
    (state,) = optimizer.state.values()
    optimizer.state_dict()
    factor = state["factor_1"].clone()
    state["factor_1"][0, 0] = float("inf")
    before = bases(optimizer)
    train(optimizer, range(GROWN + 3, GROWN + 3 + PERIOD))
    state["factor_1"].copy_(factor)
    optimizer.state_dict()
    rounds(optimizer, 1, GROWN + 3 + PERIOD)
    stats = optimizer.stats()
    assert stats.failures == {"nonfinite factor": 1}
    assert len(warned) == 1
    assert before[0].keys() == bases(optimizer)[0].keys()
    for basis in bases(optimizer)[0].values():
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4))


@over_optimizers
def test_after_many_failures_in_a_row_it_is_an_error_and_training_can_go_on(
    name: str, solver: Solver, warned: Warned
) -> None:
    optimizer = grown(name, max_failures=3)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state_dict()
    solver.failure = unusable
    raised = []
    for step in range(GROWN + 3, GROWN + 3 + 9 * PERIOD):
        set_gradients([p], step)
        if error := refusal(optimizer, RefreshError):
            raised.append(step)
            assert "3 refreshes of parameter 0 of group 0 in a row failed (no basis)" in str(error)
    assert len(raised) == 2
    assert raised[1] - raised[0] == 3 * PERIOD
    assert len(warned) == 1


@over_optimizers
def test_a_success_begins_the_row_anew(name: str, solver: Solver, warned: Warned) -> None:
    optimizer = grown(name, max_failures=3)
    optimizer.state_dict()
    for turn in range(4):
        solver.failure = unusable
        rounds(optimizer, 2, GROWN + 3 + 3 * turn * PERIOD)
        optimizer.state_dict()
        solver.failure = None
        rounds(optimizer, 1, GROWN + 3 + (3 * turn + 2) * PERIOD)
        optimizer.state_dict()
    assert optimizer.stats().failed_refreshes >= 8
    assert len(warned) == 1


@over_optimizers
def test_failures_of_inline_refreshes_are_treated_alike(
    name: str, solver: Solver, warned: Warned
) -> None:
    optimizer = build(name, RuntimeConfig(refresh="sync", max_failures=3), ONE)
    train(optimizer, range(GROWN + 3))
    solver.failure = unusable
    before = bases(optimizer)
    with pytest.raises(RefreshError, match="3 refreshes of parameter 0 of group 0 in a row"):
        rounds(optimizer, 4, GROWN + 3)
    assert optimizer.stats().failures == {"no basis": 6}
    assert all(same_bits(before[0][key], bases(optimizer)[0][key]) for key in before[0])
    solver.failure = None
    rounds(optimizer, 1, GROWN + 15)
    assert len(warned) == 1


class Fault(Exception):
    """Of a worker."""


def broken_job(*_: object, **__: object) -> Callable[[], object]:
    def inner_part_of_the_work() -> object:
        raise Fault("in the worker")

    return inner_part_of_the_work


@pytest.mark.parametrize("real", [False, True], ids=["manual", "threads"])
@over_optimizers
def test_what_a_worker_raises_is_raised_by_the_step_that_would_install(
    name: str, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the worker's traceback; nothing has changed, and the next call works."""
    optimizer = build(name, shapes=ONE) if real else manual(build(name, shapes=ONE))[0]
    (p,) = optimizer.param_groups[0]["params"]
    train(optimizer, range(GROWN + 3))
    raised = []
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "host_work", broken_job)
        for step in range(GROWN + 3, GROWN + 3 + 2 * PERIOD):
            set_gradients([p], step)
            if error := refusal(optimizer, Fault):
                raised.append(error)
    (version,) = versions(optimizer)
    for step in range(30, 30 + 3 * PERIOD):
        set_gradients([p], step)
        if error := refusal(optimizer, Fault):
            raised.append(error)
    assert 2 <= len(raised) <= 4
    assert optimizer.stats().failures == {"worker raised": len(raised)}
    for error in raised:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert "inner_part_of_the_work" in frames
    assert versions(optimizer)[0] > version
    assert optimizer.stats().in_flight <= 1
    optimizer.close()


@over_optimizers
def test_a_lost_refresh_does_not_hinder_saving(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is told by the step; a checkpoint must be possible before."""
    optimizer, workers = manual(build(name, shapes=ONE))
    train(optimizer, range(GROWN + 1))
    monkeypatch.setattr(launcher, "host_work", broken_job)
    train(optimizer, range(GROWN + 1, GROWN + 1 + PERIOD))
    workers.run_all()
    assert not all(job.succeeded for job in workers.done)
    saved, twin = optimizer.state_dict(), copy.deepcopy(optimizer)
    assert not saved["state"][0]["shadow_lands"].any()
    assert twin.stats().in_flight == 0
    with pytest.raises(Fault):
        train(optimizer, range(40, 40 + PERIOD))
