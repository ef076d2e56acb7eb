from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from benchmarks.scale_simulation import Outcome, Refresh, StepParts, simulate

PARTS = StepParts(compute_s=1.0, update_s=0.5)


def test_a_step_without_refreshes_is_the_sum_of_its_parts() -> None:
    found = simulate(PARTS, period=4)
    assert found == Outcome(step_s=1.5, longest_step_s=1.5, wait_s=0.0, busy=0.0)


def test_a_round_inside_the_step_is_paid_once_a_period() -> None:
    found = simulate(dataclasses.replace(PARTS, inside_s=2.0), period=4)
    assert found.step_s == pytest.approx(1.5 + 2.0 / 4)
    assert found.longest_step_s == pytest.approx(3.5)


@pytest.mark.parametrize(("staleness", "slack_s"), [(1, 2.5), (2, 4.0), (3, 5.5)])
def test_a_refresh_has_its_staleness_and_the_next_forward_and_backward(
    staleness: int, slack_s: float
) -> None:
    def wait_s(job_s: float) -> float:
        refresh = Refresh(owner=0, phase=0.0, job_s=job_s)
        found = simulate(PARTS, [refresh], period=10, staleness=staleness)
        assert found.step_s == pytest.approx(1.5 + found.wait_s)
        return 10 * found.wait_s

    assert wait_s(slack_s) == pytest.approx(0.0, abs=1e-9)
    assert wait_s(slack_s + 0.7) == pytest.approx(0.7)


def test_more_staleness_never_makes_steps_longer() -> None:
    refreshes = [
        Refresh(owner=n % 2, phase=n / 6, job_s=2.0 + n, travel_s=0.4, sending_s=0.3, passing_s=0.2)
        for n in range(6)
    ]
    found = [
        simulate(PARTS, refreshes, period=6, staleness=s, warm_periods=20) for s in range(1, 11)
    ]
    times = [outcome.step_s for outcome in found]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(times))
    assert times[0] > times[-1]


def test_a_host_that_is_too_slow_sets_the_pace_whatever_the_staleness() -> None:
    refreshes = [Refresh(owner=0, phase=n / 4, job_s=10.0) for n in range(4)]
    found = simulate(PARTS, refreshes, period=4, staleness=3, warm_periods=10)
    assert found.step_s == pytest.approx(10.0)
    assert found.busy == pytest.approx(1.0)
    two = simulate(PARTS, refreshes, period=4, staleness=3, jobs=2, warm_periods=10)
    assert two.step_s == pytest.approx(5.0)


def test_owners_work_at_the_same_time() -> None:
    def steps(owners: int) -> float:
        refreshes = [Refresh(owner=n % owners, phase=0.0, job_s=1.2) for n in range(4)]
        return simulate(PARTS, refreshes, period=4, staleness=1).step_s

    assert steps(4) == pytest.approx(1.5)
    assert steps(1) == pytest.approx(1.5 + (4.8 - 2.5) / 4)


def test_results_travel_one_after_the_other() -> None:
    def wait_s(**way: Any) -> float:
        refreshes = [Refresh(owner=n, phase=0.0, job_s=0.5, **way) for n in range(2)]
        return 4 * simulate(PARTS, refreshes, period=4, staleness=1).wait_s

    assert wait_s(travel_s=2.0) == pytest.approx(0.0, abs=1e-9)
    assert wait_s(travel_s=2.0, passing_s=1.5) == pytest.approx(0.5 + 2.0 + 1.5 - 2.5)
    one_owner = [
        Refresh(owner=0, phase=0.0, job_s=0.5, travel_s=1.0, sending_s=1.0) for _ in range(3)
    ]
    found = simulate(PARTS, one_owner, period=4, staleness=1, jobs=3)
    assert 4 * found.wait_s == pytest.approx(0.5 + 3.0 - 2.5)


def test_an_earlier_result_does_not_wait_for_a_later_one_of_its_way() -> None:
    slow = Refresh(owner=0, phase=0.0, job_s=3.5, travel_s=0.1, passing_s=0.1)
    quick = Refresh(owner=1, phase=0.75, job_s=0.1, travel_s=0.1, passing_s=0.1)
    assert simulate(PARTS, [slow, quick], period=4, staleness=2).wait_s == pytest.approx(0.0)


def test_refreshes_on_the_device_lengthen_the_next_step() -> None:
    refreshes = [Refresh(owner=n, phase=0.0, job_s=0.4, takes_device=True) for n in range(3)]
    found = simulate(PARTS, refreshes, period=4, staleness=1)
    assert found.step_s == pytest.approx(1.5 + 0.4 / 4)
    assert found.wait_s == 0.0
