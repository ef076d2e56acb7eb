"""Findings of a review of asynchronous refreshes, one test for each."""

import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from asteria import SOAP, ConfigError, RefreshError, RuntimeConfig
from asteria.linalg import verified
from asteria.linalg.eigenbasis import BasisResult
from asteria.refresh.job import Job
from asteria.refresh.pool import WorkerPool
from asteria.runtime import guard
from asteria.runtime.engine import Engine
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.asynchronous import GROWN, build, manual
from tests.support.execution import directed, versions
from tests.support.training import (
    assert_same_bits,
    parameters,
    set_gradients,
    train,
    weights,
)


def test_a_late_refusal_takes_back_no_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step has installed something before the device's word on this one arrives."""
    look, bad_names = Engine.accepts, guard._Verdict.bad_names
    asked: set[int] = set()
    kept_alive = []

    def gated(self: Engine, names: list[str], gradients: Any, *, ready: bool) -> Any:
        if not ready:
            return look(self, names, gradients, ready=ready)
        self._counters.steps += 1
        self._collect_verdicts(wait=False)
        return True, self._guard.gate(gradients, names)

    def one_step_late(self: Any, *, wait: bool) -> Any:
        kept_alive.append(self)
        if id(self) not in asked and not wait:
            asked.add(id(self))
            return None
        return bad_names(self, wait=wait)

    monkeypatch.setattr(Engine, "accepts", gated)
    monkeypatch.setattr(guard._Verdict, "bad_names", one_step_late)
    for bad in range(20, 30):
        params = parameters([(6, 4)])
        runtime = RuntimeConfig(nonfinite="skip")
        optimizer = SOAP(params, precondition_frequency=5, shampoo_beta=0.5, runtime=runtime)
        optimizer, workers = manual(optimizer)
        for step in range(40):
            set_gradients(params, step)
            if step == bad:
                params[0].grad[0, 0] = float("nan")  # type: ignore[index]
            before = versions(optimizer)
            optimizer.step()
            workers.run_all()
            assert step < GROWN or versions(optimizer) >= before
        # One more, because the step that was refused counted until the word arrived.
        assert max(optimizer.stats().staleness["6x4"]) <= 5 + 2 + 1


def test_another_staleness_is_kept_from_the_first_update() -> None:
    """What was in flight lands at once where its time is over."""
    source, params = _aged(RuntimeConfig(staleness=20))
    other = _resumed(source, params, RuntimeConfig(staleness=2))
    train(other, range(64, 110))
    assert max(other.stats().staleness["6x4"]) <= 10 + 2


def test_a_synchronous_run_refreshes_at_once_what_was_loaded_too_old() -> None:
    source, params = _aged(RuntimeConfig(staleness=20))
    other = _resumed(source, params, RuntimeConfig(refresh="sync"))
    train(other, [64])
    assert max(other.stats().staleness["6x4"]) > 10
    assert versions(other) == [[64]]
    train(other, range(65, 110))
    ages = other.stats().staleness["6x4"]
    assert sum(count for age, count in ages.items() if age > 10) == 1


def _resumed(source: SOAP, params: list[torch.nn.Parameter], runtime: RuntimeConfig) -> SOAP:
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = SOAP(copies, precondition_frequency=10, shampoo_beta=0.5, runtime=runtime)
    other.load_state_dict(source.state_dict())
    return other


def _aged(runtime: RuntimeConfig) -> tuple[SOAP, list[torch.nn.Parameter]]:
    params = parameters([(6, 4)])
    optimizer = SOAP(params, precondition_frequency=10, shampoo_beta=0.5, runtime=runtime)
    train(optimizer, range(64))
    return optimizer, params


def test_the_clock_decides_nothing_among_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "asteria.runtime.peers.peer_group"
    monkeypatch.setattr(group, lambda asked: None if asked == "alone" else object())
    params = parameters([(6, 4)])
    optimizer = SOAP(params, precondition_frequency="auto")
    before = weights(params)
    with pytest.raises(ConfigError, match='frequency="auto" was asked for, found other processes'):
        train(optimizer, [0])
    assert_same_bits(weights(params), before)
    alone = RuntimeConfig(process_group="alone")
    train(SOAP(params, precondition_frequency="auto", runtime=alone), range(3))


@pytest.fixture
def sick() -> Iterator[list[int]]:
    """Sizes of factors whose refreshes fail in every precision."""
    sizes: list[int] = []
    real = verified._attempt

    def attempt(factor: torch.Tensor, basis: torch.Tensor, **options: Any) -> BasisResult:
        result = real(factor, basis, **options)
        if factor.shape[-1] in sizes:
            return BasisResult(result.basis, torch.zeros_like(result.usable))
        return result

    verified._attempt = attempt
    yield sizes
    verified._attempt = real


@over_optimizers
def test_a_basis_that_was_kept_is_not_called_fresh(name: str, sick: list[int]) -> None:
    optimizer, workers = manual(build(name, RuntimeConfig(max_failures=1000), [(6, 4)]))
    train(optimizer, range(GROWN + 4))
    (before,) = versions(optimizer)
    counted = optimizer.stats()
    sick += [6, 4]
    with pytest.warns(RuntimeWarning, match="stays in use"):
        train(optimizer, range(GROWN + 4, GROWN + 40))
    stats = optimizer.stats()
    assert versions(optimizer)[0][0] <= before[0] + 3, "only what was in flight has landed"
    assert max(stats.staleness["6x4"]) > 30
    assert stats.installs - counted.installs <= 2
    assert stats.refreshes - counted.refreshes > 20
    launched = len(workers.submitted)
    train(optimizer, range(GROWN + 40, GROWN + 46))
    assert len(workers.submitted) - launched == 2, "every period, not at every step"


def test_a_failure_does_not_bring_an_older_basis_back(sick: list[int]) -> None:
    """With a delay of several periods, a newer one is in use than the snapshot had."""
    runtime = RuntimeConfig(staleness=7, max_failures=1000)
    optimizer, workers = manual(build("SOAP", runtime, [(6, 4)]))
    train(optimizer, range(GROWN + 20))
    workers.run_all()
    sick += [6, 4]
    train(optimizer, range(GROWN + 20, GROWN + 28))  # until the last good one has landed
    (state,) = optimizer.state.values()
    before = {key: state[key].clone() for key in ("basis_0", "basis_1")}
    with pytest.warns(RuntimeWarning, match="stays in use"):
        train(optimizer, range(GROWN + 28, GROWN + 50))
    assert_same_bits({key: state[key] for key in before}, before)
    assert versions(optimizer)[0][0] > GROWN


def test_the_parameter_that_failed_is_named() -> None:
    named = list(zip(("good", "fine", "bad"), parameters([(6, 4)] * 3), strict=True))
    runtime = RuntimeConfig(refresh="sync", max_failures=3)
    optimizer = SOAP(named, precondition_frequency=1, runtime=runtime)
    train(optimizer, range(4))
    optimizer.state[named[2][1]]["factor_0"].fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="refresh of bad failed \\(nonfinite factor\\)"):
        train(optimizer, range(4, 7))
    with pytest.raises(RefreshError, match="3 refreshes of bad in a row failed"):
        train(optimizer, [7])


def test_first_bases_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    params = parameters([(6, 4)])
    optimizer = SOAP([("odd", params[0])])
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.stats().failures == {"no first basis": 2}
    set_gradients(params, 1)
    with pytest.warns(RuntimeWarning, match="refresh of odd failed \\(no first basis\\)"):
        optimizer.step()


def test_a_job_that_an_interrupt_has_lost_is_found_again() -> None:
    pool = WorkerPool(1)
    job = Job(lambda: "done", name="lost", urgency=())
    pool.wait(job)  # was never submitted
    assert job.outcome() == "done"
    pool.close()


def test_what_is_urgent_is_told_by_the_steps_of_the_optimizer() -> None:
    """A layer that joined late counts fewer steps of its own."""
    params = parameters([(6, 4), (5, 4)])
    optimizer, workers = manual(SOAP(params, precondition_frequency=3, shampoo_beta=0.5))
    for step in range(80):
        set_gradients(params, step)
        if step < 40:
            params[1].grad = None
        optimizer.step()
    late = [job for job in workers.submitted if job.name.startswith("refresh of parameter 1")]
    first = int(late[0].name.rsplit(" ", 1)[-1])
    assert late[0].urgency[0] == 40 + first + 1, "its own step, as the optimizer counts"


BUSY = "while True: pass"
never = threading.Event()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other, which takes for ever on a busy host."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_busy_host_changes_no_bit() -> None:
    """Five busy loops beside real workers that sleep at random, and none of it: 200 steps."""
    quiet = {name: _run(name, 0.0) for name in OPTIMIZERS}
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(5)]
    try:
        for name, expected in quiet.items():
            assert_same_bits(_run(name, 0.002), expected)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Sleepy(WorkerPool):
    """Workers that take their time, at random."""

    def __init__(self, longest_s: float) -> None:
        super().__init__(1)
        self.longest_s, self.chance = longest_s, random.Random(0)

    def submit(self, job: Job[Any]) -> None:
        work, delay_s = job._work, self.chance.random() * self.longest_s
        assert work is not None

        def late() -> Any:
            never.wait(delay_s)
            return work()

        job._work = late
        super().submit(job)


def _run(name: str, longest_s: float) -> Any:
    params = parameters([(12, 8), (8, 8), (5,), (3, 32, 32)])
    optimizer = OPTIMIZERS[name](params, precondition_frequency=3, shampoo_beta=0.9)
    if longest_s:
        directed(optimizer, Sleepy(longest_s))
    with optimizer, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a busy host may well be told so
        train(optimizer, range(200))
    return weights(params)
