"""What is decided from measured costs: the automatic period, dear young rounds, recurring waits.

The clock is made up, and jobs take the seconds that a test says.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asteria import SOAP, RuntimeConfig
from asteria.refresh.job import Job
from asteria.runtime.engine import Engine
from tests.support.training import assert_same_bits, parameters, set_gradients, weights

SHAPES = [(6, 4), (4, 4), (5,)]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Host:
    """An executor of one worker that does a job when it is waited for, in so many seconds."""

    size = 1
    deaths = 0

    def __init__(self, clock: Clock, job_s: float, wait_s: float = 0.0) -> None:
        self.clock, self.job_s, self.wait_s = clock, job_s, wait_s

    def submit(self, job: Job[Any]) -> None:
        if not self.wait_s:
            self._do(job)

    def wait(self, job: Job[Any]) -> None:
        self.clock.now_s += self.wait_s
        self._do(job)

    def _do(self, job: Job[Any]) -> None:
        job.run()
        job.started_ns, job.ended_ns = 0, int(self.job_s * 1e9)

    def discard(self, job: Job[Any]) -> None:
        pass

    def close(self) -> None:
        pass


def build(
    clock: Clock, host: Host | None = None, **options: Any
) -> tuple[SOAP, list[nn.Parameter]]:
    runtime = options.pop("runtime", RuntimeConfig())
    params = parameters(SHAPES)
    optimizer = SOAP(params, lr=0.01, runtime=runtime, **options)
    optimizer._engine = Engine(runtime, executor=host, clock=clock)
    return optimizer, params


def steps(
    optimizer: SOAP,
    params: list[nn.Parameter],
    clock: Clock,
    count: range,
    step_s: float = 1.0,
    before: Callable[[int], None] = lambda step: None,
) -> None:
    for step in count:
        before(step)
        set_gradients(params, step)
        optimizer.step()
        clock.now_s += step_s


def test_auto_takes_the_smallest_period_that_the_host_sustains() -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=3.0), precondition_frequency="auto")
    steps(optimizer, params, clock, range(20))
    assert optimizer.param_groups[0]["precondition_frequency"] == "auto"
    steps(optimizer, params, clock, range(20, 40))
    # Two matrices of 3 s each, steps of 1 s, half of one worker's time.
    assert optimizer.stats().sustainable_period == 12
    assert optimizer.param_groups[0]["precondition_frequency"] == 12


def test_auto_is_frozen_and_saved() -> None:
    clock = Clock()
    host = Host(clock, job_s=3.0)
    optimizer, params = build(clock, host, precondition_frequency="auto")
    steps(optimizer, params, clock, range(40))
    host.job_s = 50.0
    steps(optimizer, params, clock, range(40, 80))
    assert optimizer.param_groups[0]["precondition_frequency"] == 12
    other, _ = build(Clock(), Host(clock, job_s=1.0), precondition_frequency="auto")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["precondition_frequency"] == 12


def test_auto_of_one_group_leaves_the_others_alone() -> None:
    clock = Clock()
    host = Host(clock, job_s=3.0)
    params = parameters(SHAPES)
    optimizer = SOAP(
        [{"params": params[:1]}, {"params": params[1:], "precondition_frequency": "auto"}], lr=0.01
    )
    optimizer._engine = Engine(RuntimeConfig(), executor=host, clock=clock)
    steps(optimizer, params, clock, range(40))
    assert [g["precondition_frequency"] for g in optimizer.param_groups] == [10, 12]


def test_auto_of_synchronous_refreshes_keeps_to_a_share_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    runtime = RuntimeConfig(refresh="sync", start="eigh")
    optimizer, params = build(clock, runtime=runtime, precondition_frequency="auto")
    refresh = optimizer._engine._stepper._inside._inline.refresh_

    def slow(*args: Any, **kwargs: Any) -> None:
        clock.now_s += 1.0
        refresh(*args, **kwargs)

    monkeypatch.setattr(optimizer._engine._stepper._inside._inline, "refresh_", slow)
    steps(optimizer, params, clock, range(40))
    # 2 s of refreshes (two block shapes), steps of 1 s, a fifth of the time.
    assert optimizer.param_groups[0]["precondition_frequency"] == 10


def test_a_warning_names_the_period_that_the_host_could_sustain() -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=3.0, wait_s=3.0), shampoo_beta=0.5)
    with pytest.warns(RuntimeWarning, match="could sustain\\s+precondition_frequency=") as caught:
        steps(optimizer, params, clock, range(120))
    assert len(caught) == 1
    assert optimizer.stats().waits > 0


def test_waits_for_young_factors_are_no_sign_of_a_slow_host() -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=3.0, wait_s=3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, params, clock, range(120))
    assert optimizer.stats().wait_s > 10


@pytest.mark.parametrize(("job_s", "period"), [(3.0, 12), (12.0, 48)])
def test_auto_is_not_misled_by_the_waits_of_a_slow_host(job_s: float, period: int) -> None:
    """They make steps longer, but that is no time that the host could use."""
    clock = Clock()
    host = Host(clock, job_s=job_s, wait_s=job_s)
    optimizer, params = build(clock, host, precondition_frequency="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        steps(optimizer, params, clock, range(60))
    assert optimizer.param_groups[0]["precondition_frequency"] == period


def test_a_group_that_joins_is_measured_before_its_period_is_chosen() -> None:
    clock = Clock()
    host = Host(clock, job_s=3.0)
    optimizer, params = build(clock, host, precondition_frequency="auto")
    steps(optimizer, params, clock, range(40))
    late = parameters([(4, 4)] * 4)
    optimizer.add_param_group({"params": late, "precondition_frequency": "auto"})
    steps(optimizer, params + late, clock, range(40, 60))
    assert optimizer.param_groups[1]["precondition_frequency"] == "auto"
    steps(optimizer, params + late, clock, range(60, 90))
    assert [g["precondition_frequency"] for g in optimizer.param_groups] == [12, 36]


def test_a_layer_that_joins_late_is_priced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=0.1), shampoo_beta=0.5)
    steps(optimizer, params, clock, range(40))
    late = parameters([(4, 4)])
    optimizer.add_param_group({"params": late})
    slow_rounds(optimizer, clock, 20.0, monkeypatch)
    with pytest.warns(RuntimeWarning, match="young_stride"):
        steps(optimizer, params + late, clock, range(40, 60))
    assert optimizer.param_groups[1]["young_stride"] > 1


def test_short_waits_bother_nobody() -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=0.01, wait_s=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, params, clock, range(120), step_s=0.05)
    assert optimizer.stats().waits > 0


def slow_rounds(
    optimizer: SOAP, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("begin_", "refresh_"):
        work = getattr(optimizer._engine._stepper._inside._inline, name)

        def slow(*args: Any, work: Callable[..., None] = work, **kwargs: Any) -> None:
            clock.now_s += seconds
            work(*args, **kwargs)

        monkeypatch.setattr(optimizer._engine._stepper._inside._inline, name, slow)


def test_dear_young_rounds_are_thinned_once_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=0.1))
    slow_rounds(optimizer, clock, 20.0, monkeypatch)
    with pytest.warns(RuntimeWarning, match="every 6th is done") as caught:
        steps(optimizer, params, clock, range(200))
    assert len(caught) == 1
    assert optimizer.param_groups[0]["young_stride"] == 6
    stats = optimizer.stats()
    assert stats.young_rounds == 2  # of 11: the first and the seventh
    assert stats.refresh_s >= 2 * 40


def test_cheap_young_rounds_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for seconds in (0.0, 4.0):
        clock = Clock()
        optimizer, params = build(clock, Host(clock, job_s=0.1))
        slow_rounds(optimizer, clock, seconds, monkeypatch)
        steps(optimizer, params, clock, range(60), step_s=0.001)
        results.append(weights(params))
    assert_same_bits(*results)


def test_a_thinned_run_resumes_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    optimizer, params = build(clock, Host(clock, job_s=0.1))
    slow_rounds(optimizer, clock, 20.0, monkeypatch)
    with pytest.warns(RuntimeWarning, match="young_stride"):
        steps(optimizer, params, clock, range(10))
    saved = optimizer.state_dict()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = SOAP(copies, lr=0.01)
    other.load_state_dict(saved)
    steps(optimizer, params, clock, range(10, 60))
    steps(other, copies, clock, range(10, 60))
    assert_same_bits(weights(copies), weights(params))
    assert torch.equal(params[0], copies[0])
