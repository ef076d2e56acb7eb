"""Asynchronous refreshes: when they are installed, and that workers decide nothing but the speed.

Here workers are told what to do, or are real ones whose timing nobody knows.
"""

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import RuntimeConfig
from asteria.linalg.verified import verified_refresh
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.pool import WorkerPool
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, JOB_S, bases, build, flying, manual
from tests.support.execution import FakeClock, ManualExecutor, directed, versions
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    Bits,
    assert_near,
    assert_same_bits,
    everything,
    same_bits,
    set_gradients,
    train,
    weights,
)

over_staleness = pytest.mark.parametrize("staleness", [1, 2, 5, 2 * PERIOD + 1])


# Which results there are


@pytest.mark.parametrize("start", ["fresh", "eigh", "adam"])
@over_optimizers
def test_without_staleness_it_is_the_synchronous_run(name: str, start: Any) -> None:
    steps = range(25)
    finals = []
    for runtime in (
        RuntimeConfig(start=start, staleness=0),
        RuntimeConfig(start=start, staleness=0, install="ready", workers=2),
        RuntimeConfig(start=start, refresh="sync"),
    ):
        optimizer = build(name, runtime)
        train(optimizer, steps)
        finals.append(everything(optimizer))
    assert_same_bits(finals[0], finals[2])
    assert_same_bits(finals[1], finals[2])


@over_optimizers
def test_staleness_is_seen_in_the_result(name: str) -> None:
    """Else the tests below would compare runs that nobody has delayed."""
    finals = []
    for staleness in (0, 1, 2):
        optimizer = build(name, RuntimeConfig(staleness=staleness))
        train(optimizer, range(30))
        finals.append(weights(optimizer.param_groups[0]["params"]))
    assert not same_bits(finals[0]["0"], finals[1]["0"])
    assert not same_bits(finals[1]["0"], finals[2]["0"])


def run(
    name: str, runtime: RuntimeConfig, steps: int, between: Callable[[ManualExecutor], None]
) -> Bits:
    optimizer, workers = manual(build(name, runtime))
    for step in range(steps):
        train(optimizer, [step])
        between(workers)
    return everything(optimizer)


def do_all(workers: ManualExecutor) -> None:
    workers.run_all()


def do_nothing(workers: ManualExecutor) -> None:
    pass


def at_random(seed: int) -> Callable[[ManualExecutor], None]:
    chance = random.Random(seed)
    return lambda workers: workers.run_some(chance)


@over_staleness
@over_optimizers
def test_scheduled_results_do_not_depend_on_the_workers(name: str, staleness: int) -> None:
    """Done at once, only when waited for, or at any time between, in any order."""
    steps = 200 if staleness == 2 else 40
    runtime = RuntimeConfig(staleness=staleness)
    expected = run(name, runtime, steps, do_nothing)
    for between in (do_all, at_random(1)) if staleness != 2 else (at_random(2),):
        assert_same_bits(run(name, runtime, steps, between), expected)


@over_optimizers
def test_scheduled_results_are_those_of_real_workers_too(name: str) -> None:
    expected = run(name, RuntimeConfig(), 60, do_all)
    for workers in (1, 8):
        with directed(build(name), WorkerPool(workers)) as optimizer:
            train(optimizer, range(60))
            assert_same_bits(everything(optimizer), expected)


@over_optimizers
def test_with_ready_the_workers_decide(name: str) -> None:
    runtime = RuntimeConfig(install="ready", staleness=2)
    late, early = (run(name, runtime, 40, between) for between in (do_nothing, do_all))
    assert_same_bits(late, run(name, RuntimeConfig(staleness=2), 40, do_nothing))
    assert not same_bits(late["0"], early["0"])


@over_staleness
@pytest.mark.parametrize("method", ["qr", "eigh", "ldlr"])
@over_optimizers
def test_a_refresh_is_of_the_factors_and_bases_of_its_step(
    name: str, method: Any, staleness: int
) -> None:
    """Computed here from what the state was after that step, though installed steps later."""
    runtime = RuntimeConfig(refresh_method=method, staleness=staleness)
    optimizer, _ = manual(build(name, runtime))
    sort = OPTIMIZERS[name].rule.sorts_columns
    history: dict[int, Bits] = {}
    installed = 0
    for step in range(GROWN + 4 * PERIOD + staleness):
        before = versions(optimizer)
        train(optimizer, [step])
        history[step] = now = everything(optimizer)
        if step <= GROWN:
            continue
        matrices = [p for p in ("0", "2", "3") if f"{p}.version" in now]
        for p, (old,), (version,) in zip(matrices, before, versions(optimizer), strict=True):
            if version == old:
                continue
            installed += 1
            then = history[version]  # the first call of step() moves nothing and counts none
            for mode in range(3 if p == "3" else 2):
                expected = verified_refresh(
                    then[f"{p}.factor_{mode}"][None],
                    then[f"{p}.basis_{mode}"].mT.contiguous().mT[None],
                    method=method,
                    sort=sort,
                ).basis[0]
                assert_near({"": now[f"{p}.basis_{mode}"]}, {"": expected}, SAME_MATH, now[p].dtype)
    assert installed >= 9


# When they are installed


@over_staleness
@over_optimizers
def test_scheduled_installs_come_exactly_after_the_staleness(name: str, staleness: int) -> None:
    optimizer, workers = manual(build(name, RuntimeConfig(staleness=staleness)))
    train(optimizer, range(GROWN + staleness + PERIOD))
    for step in range(GROWN + staleness + PERIOD, GROWN + staleness + 4 * PERIOD):
        before = versions(optimizer)
        train(optimizer, [step])
        workers.run_all()
        for (old,), (new,) in zip(before, versions(optimizer), strict=True):
            # Before update `step`, of what was launched after update `step - staleness - 1`.
            assert new == (old if old + PERIOD + staleness + 1 > step else step - staleness - 1)


@over_optimizers
def test_ready_installs_come_with_the_next_step_or_at_the_bound(name: str) -> None:
    runtime = RuntimeConfig(install="ready", staleness=4)
    optimizer, workers = manual(build(name, runtime, precondition_frequency=10))
    landed: Counter[int] = Counter()
    for step in range(60):
        before = flying(optimizer)
        done = {flight for flight in before if flight.job.done}
        train(optimizer, [step])
        gone = before - flying(optimizer)
        if step > GROWN:
            assert gone == done | {f for f in before if f.version + 4 == step - 1}
            landed += Counter(step - flight.version for flight in gone)
        if step % 3 == 0:
            workers.run_all()
    assert set(landed) == {1, 2, 3}
    assert optimizer.stats().waits == len(workers.waited_for)


@pytest.mark.parametrize("install", ["scheduled", "ready"])
@pytest.mark.parametrize("seed", range(3))
@over_optimizers
def test_no_basis_is_ever_older_than_period_and_staleness(
    name: str, seed: int, install: Any
) -> None:
    """Whatever the workers' speed, with gradients missing and the period changed on the way."""
    chance = random.Random(seed)
    staleness = chance.choice([1, 2, 3, 7])
    runtime = RuntimeConfig(install=install, staleness=staleness)
    optimizer, workers = manual(build(name, runtime))
    params = optimizer.param_groups[0]["params"]
    periods = [PERIOD]
    for step in range(90):
        if step % 30 == 29:
            optimizer.param_groups[0]["precondition_frequency"] = chance.choice([1, 2, 5, 9])
        periods.append(optimizer.param_groups[0]["precondition_frequency"])
        set_gradients(params, step)
        for p in params:
            if chance.random() < 0.3:
                p.grad = None
        optimizer.step()
        workers.run_some(chance)
        for p in params:
            entries = optimizer.state.get(p, {})
            if "version" in entries and p.grad is not None:
                # A period that was just shortened acts on refreshes from this step on.
                age = entries["step"] - entries["version"].min()
                assert age <= max(periods) + staleness
                if len(set(periods[-29:])) == 1 and step % 30 == 28 and step > 60:
                    assert age <= periods[-1] + staleness
    oldest = max(age for ages in optimizer.stats().staleness.values() for age in ages)
    assert oldest <= max(periods) + staleness


@pytest.mark.parametrize(("period", "next_period"), [(5, 9), (9, 5), (2, 7)])
@over_optimizers
def test_a_changed_period_leaves_no_basis_unattended(
    name: str, period: int, next_period: int
) -> None:
    """Though another period puts the refreshes of a parameter at other steps."""
    for offset in range(0, period, 2):
        optimizer, _ = manual(build(name, precondition_frequency=period))
        train(optimizer, range(GROWN + offset))
        optimizer.param_groups[0]["precondition_frequency"] = next_period
        for step in range(GROWN + offset, GROWN + offset + 2 * next_period):
            train(optimizer, [step])
            oldest = min(version for tiles in versions(optimizer) for version in tiles)
            assert step - oldest <= max(period, next_period) + 2


@over_optimizers
def test_ages_are_counted_as_they_were(name: str) -> None:
    optimizer, workers = manual(build(name))
    train(optimizer, range(GROWN))
    before = optimizer.stats().staleness
    seen: Counter[int] = Counter()
    for step in range(GROWN, GROWN + 20):
        train(optimizer, [step])
        workers.run_some(random.Random(step))
        seen += Counter(step - version for tiles in versions(optimizer) for version in tiles)
    after = optimizer.stats().staleness
    assert after.keys() == before.keys() == {"6x4", "4x4", "3x2x4"}
    grown = sum((Counter(after[shape]) for shape in after), Counter[int]())
    grown.subtract(sum((Counter(before[shape]) for shape in before), Counter[int]()))
    assert +grown == seen
    assert max(seen) == PERIOD + 2


@over_optimizers
def test_ages_of_state_that_is_replaced_are_not_forgotten(name: str) -> None:
    optimizer = build(name)
    train(optimizer, range(30))
    before = optimizer.stats().staleness
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats().staleness == before
    (p, *_) = optimizer.param_groups[0]["params"]
    del optimizer.state[p]
    optimizer.state_dict()
    assert optimizer.stats().staleness == before


@pytest.mark.filterwarnings("ignore:.*waiting for refreshes:RuntimeWarning")
@over_optimizers
def test_waits_are_counted_and_timed(name: str) -> None:
    clock = FakeClock()
    optimizer, workers = manual(build(name), clock)
    chance = random.Random(3)
    train(optimizer, range(GROWN))
    for step in range(GROWN, 60):
        workers.run_some(chance)
        train(optimizer, [step])
        stats = optimizer.stats()
        assert stats.waits == len(workers.waited_for)
        assert stats.wait_s == stats.visible_s == stats.waits * JOB_S
        assert stats.in_flight >= len(workers.queue)
    assert 0 < stats.waits < len(workers.done)
    waits = stats.waits
    optimizer.state_dict()
    assert optimizer.stats().waits == waits, "saving is no step"


@over_optimizers
def test_nobody_waits_for_workers_that_are_in_time(name: str) -> None:
    optimizer, workers = manual(build(name))
    for step in range(60):
        train(optimizer, [step])
        workers.run_all()
    stats = optimizer.stats()
    assert (stats.waits, stats.wait_s) == (0, 0.0)
    left = {flight.job for flight in flying(optimizer)}
    landed = [job for job in workers.done if job not in left and job not in workers.discarded]
    modes = sum(3 if "parameter 3" in job.name else 2 for job in landed)
    assert stats.in_flight == len(left)
    assert stats.refreshes == stats.installs == 7 * (1 + stats.young_rounds) + modes
    assert stats.failed_refreshes == stats.retried_refreshes == stats.worker_deaths == 0


@over_optimizers
def test_all_of_a_tile_changes_in_one_step_and_only_when_its_version_does(name: str) -> None:
    optimizer, workers = manual(build(name))
    chance = random.Random(0)
    for step in range(50):
        old, old_versions = bases(optimizer), versions(optimizer)
        train(optimizer, [step])
        workers.run_some(chance)
        if not step:
            continue
        for before, after, was, now in zip(
            old, bases(optimizer), old_versions, versions(optimizer), strict=True
        ):
            changed = [not same_bits(before[key], after[key]) for key in before]
            assert set(changed) == {was != now}


@pytest.mark.parametrize("name", ["SOAP", "KLSOAP"])
def test_moments_are_carried_along_in_the_step_of_the_install(name: str) -> None:
    """A step without a gradient shrinks the first moment, as the weights see it, and no more."""
    optimizer, _ = manual(build(name, shapes=[(6, 4)], betas=(0.75, 0.9)))
    (p,) = optimizer.param_groups[0]["params"]
    installs = 0

    def momentum(of: SecondOrderOptimizer) -> Tensor:
        (state,) = of.state.values()
        return state["basis_0"] @ state["exp_avg"] @ state["basis_1"].mT

    for step in range(GROWN + 9):
        train(optimizer, [step])
        if step < GROWN:
            continue
        twin = copy.deepcopy(optimizer)
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.zeros_like(q)
        twin.step()
        installs += versions(twin) != versions(optimizer)
        actual, expected = {"": momentum(twin)}, {"": 0.75 * momentum(optimizer)}
        assert_near(actual, expected, SAME_MATH, p.dtype)
    assert installs == 2
