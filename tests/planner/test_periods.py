"""Seconds of a round, the period that a host sustains, and what is said about it."""

from typing import Any

import pytest

import asteria
from asteria.config.runtime import RuntimeConfig
from asteria.planner.machine import Machine
from asteria.planner.plan import Plan

MACHINE = Machine(
    cores=4,
    training_threads=2,
    refresh_s=((100, 0.1), (200, 0.4)),
    exact_s=((100, 1.0),),
    math_threads=2,
)
SHAPES = [("a", (100, 200)), ("b", (100, 200)), ("c", (7,))]
ROUND_S = 2 * (0.1 + 0.4)


def planned(step_s: float | None = None, machine: Machine = MACHINE, **options: Any) -> Plan:
    config = {k: options.pop(k) for k in ("refresh", "staleness", "workers") if k in options}
    method = options.pop("refresh_method", "auto")
    runtime = RuntimeConfig(refresh_method=method, **config)
    return asteria.plan(SHAPES, machine=machine, runtime=runtime, step_s=step_s, **options)


def test_a_round_costs_what_its_factors_cost() -> None:
    fresh = planned().refreshes
    assert fresh.factors == {100: 2, 200: 2}
    assert fresh.round_s == pytest.approx(ROUND_S)
    assert fresh.longest_s == pytest.approx(0.5), "one parameter, both its factors"
    assert fresh.first_s == pytest.approx((2 * 1.0 + 2 * 8.0) * 2 / 4)
    assert (fresh.period, fresh.staleness, fresh.oldest_steps) == (10, 2, 12)
    assert planned(refresh_method="eigh").refreshes.round_s == pytest.approx(2 * (1.0 + 8.0))
    assert planned(refresh_method="ldlr").refreshes.round_s == pytest.approx(2 * ROUND_S)


def test_what_a_step_must_take_for_the_period_to_hold() -> None:
    fresh = planned().refreshes
    assert fresh.sustainable_period is fresh.is_sustainable is fresh.needed_staleness is None
    # Half of the time of one worker.
    assert fresh.shortest_step_s == pytest.approx(ROUND_S / (10 * 0.5))
    assert planned(step_s=fresh.shortest_step_s * 1.01).refreshes.is_sustainable
    short = planned(step_s=fresh.shortest_step_s * 0.99).refreshes
    assert short.is_sustainable is False
    assert short.sustainable_period == 11


def test_a_period_that_is_not_sustained_is_told_and_the_advice_holds() -> None:
    plan = planned(step_s=0.1)
    assert plan.fits
    assert "this host sustains a refresh every 20 steps, not every 10" in plan.warnings[0]
    assert "precondition_frequency=20" in plan.suggestions[0]
    assert planned(step_s=0.1, precondition_frequency=20, staleness=5).warnings == ()


def test_a_single_refresh_that_is_too_long_is_told_and_the_advice_holds() -> None:
    plan = planned(step_s=0.2)
    assert "takes 500 ms, 3 steps" in plan.warnings[0]
    assert plan.refreshes.needed_staleness == 3
    assert plan.suggestions == ("staleness=3, or smaller blocks",)
    assert planned(step_s=0.2, staleness=3).warnings == ()


def test_smaller_blocks_are_suggested_where_they_are_cheaper() -> None:
    large = [("wide", (2048, 2048))]
    plan = asteria.plan(large, machine=Machine(), step_s=0.1)
    wanted = next(line for line in plan.suggestions if "large_dims='blocks'" in line)
    side = int(wanted.split("max_precond_dim=")[1].split(":")[0])
    cut = asteria.plan(
        large, machine=Machine(), step_s=0.1, large_dims="blocks", max_precond_dim=side
    )
    assert cut.refreshes.round_s < plan.refreshes.round_s
    assert f"period of {cut.refreshes.sustainable_period} steps" in wanted


def test_workers_share_the_work() -> None:
    many = planned(step_s=0.1, workers=8).refreshes
    assert (many.jobs, many.threads, many.beside) == (2, 4, True)
    assert many.round_s == pytest.approx(ROUND_S * 2 / 4), "measured with two threads"
    few = planned(step_s=0.1, workers=1).refreshes
    assert (few.jobs, few.threads) == (1, 1)
    assert few.sustainable_period == 40
    assert many.sustainable_period == 5


def test_synchronous_refreshes_take_all_cores_and_are_not_stale() -> None:
    for config in ({"refresh": "sync"}, {"staleness": 0}):
        fresh = planned(step_s=0.1, **config).refreshes
        assert (fresh.beside, fresh.threads, fresh.staleness) == (False, 4, 0)
        # A fifth of the training time.
        assert fresh.sustainable_period == 25


def test_an_automatic_period_begins_with_ten_steps() -> None:
    assert planned(precondition_frequency="auto").refreshes.period == 10


def test_training_leaves_cores_free() -> None:
    assert Machine(cores=8).free_cores == 1, "computes on all of them"
    assert Machine(cores=8, device_bytes=2**30).free_cores == 6
    assert Machine(cores=8, training_threads=3).free_cores == 5
    assert Machine(cores=1, training_threads=3).free_cores == 1


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(100, 0.1), (200, 0.4), (50, 0.1 / 8), (400, 3.2), (141, 0.1 * 1.41**2)],
)
def test_sizes_between_and_beyond_the_measured_ones(size: int, seconds: float) -> None:
    assert MACHINE.seconds(size, 2, method="qr") == pytest.approx(seconds, rel=1e-3)
    assert MACHINE.seconds(size, 1, method="qr") == pytest.approx(2 * seconds, rel=1e-3)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_a_step_takes_a_positive_time(wrong: float) -> None:
    with pytest.raises(asteria.ConfigError, match="step_s must be a number of seconds > 0"):
        planned(step_s=wrong)


@pytest.mark.parametrize("name", ["SOAP", "KL-Shampoo", "kl_soap"])
def test_optimizers_by_name(name: str) -> None:
    assert asteria.plan([(4, 3)], optimizer=name).optimizer == name.lower().replace("_", "-")


def test_optimizers_by_class_and_errors_of_theirs() -> None:
    assert asteria.plan([(4, 3)], optimizer=asteria.KLSOAP).optimizer == "kl-soap"
    with pytest.raises(asteria.ConfigError, match="'sopa' was asked for.*did you mean 'soap'"):
        asteria.plan([(4, 3)], optimizer="sopa")
    with pytest.raises(asteria.ConfigError, match="unknown option 'max_dim'"):
        asteria.plan([(4, 3)], max_dim=3)
    with pytest.raises(asteria.ConfigError, match="max_precond_dim must be an int"):
        asteria.plan([(4, 3)], max_precond_dim=0)
    with pytest.raises(asteria.ConfigError, match="parameter 0: batch_dims=2"):
        asteria.plan([(4, 3)], batch_dims=2)
    with pytest.raises(asteria.ConfigError, match="runtime"):
        asteria.plan([(4, 3)], runtime="sync")  # type: ignore[arg-type]
