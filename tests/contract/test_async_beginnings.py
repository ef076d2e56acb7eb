"""Asynchronous refreshes in the beginning, and of parameters that come later."""

import random

import torch

from asteria import RuntimeConfig
from asteria.refresh.schedule import is_young_step, young_steps
from tests.support.arms import PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, build, flying, manual
from tests.support.execution import versions
from tests.support.training import (
    Bits,
    everything,
    gradient,
    parameters,
    same_bits,
    set_gradients,
    train,
    weights,
)

# Young factors and other starts


@over_optimizers
def test_young_factors_are_refreshed_at_once(name: str) -> None:
    """At the marks inside the step, between them by workers, for the very next update."""
    optimizer, workers = manual(build(name, shampoo_beta=0.75))
    marks = [step for step in range(1, 40) if is_young_step(step) and step < young_steps(0.75)]
    assert marks == [2, 3, 5, 8, 12, 18, 27]
    for step in range(32):
        train(optimizer, [step])
        if step in marks:
            assert versions(optimizer) == [[step]] * 3
            assert optimizer.stats().in_flight == 0
            assert not workers.queue, "nobody works for nothing"
        landings = [flight.lands - flight.version for flight in flying(optimizer)]
        assert landings == [0] * len(landings)
    assert optimizer.stats().young_rounds == len(marks)
    assert workers.done
    assert not any(
        f"step {mark}" == job.name[-len(f"step {mark}") :]
        for mark in marks
        for job in workers.submitted
    )
    for step in range(32, 40):
        train(optimizer, [step])
    assert {flight.lands - flight.version for flight in flying(optimizer)} == {2}


@over_optimizers
def test_dear_young_rounds_make_early_waits_too_dear_as_well(name: str) -> None:
    optimizer, _ = manual(build(name, shampoo_beta=0.75))
    optimizer.param_groups[0]["young_stride"] = 3
    train(optimizer, range(20))
    assert {flight.lands - flight.version for flight in flying(optimizer)} == {2}


@over_optimizers
def test_start_adam_keeps_identities_until_the_first_install(name: str) -> None:
    optimizer, _ = manual(build(name, RuntimeConfig(start="adam")))
    factors: dict[int, Bits] = {}
    first: set[str] = set()
    for step in range(1, 2 * PERIOD + 4):
        train(optimizer, [step])
        now = everything(optimizer)
        factors[step] = now
        for p in ("0", "2", "3"):
            (version,) = (int(v) for v in now[f"{p}.version"])
            for mode in range(3 if p == "3" else 2):
                basis = now[f"{p}.basis_{mode}"]
                if version == 0:
                    assert torch.equal(basis, torch.eye(len(basis)))
                elif p not in first:
                    factor = factors[version][f"{p}.factor_{mode}"]
                    rotated = basis.mT @ factor @ basis
                    rest = rotated - rotated.diagonal().diag()
                    assert rest.abs().max() < 1e-4 * rotated.trace(), "the first one is exact"
            if version and p not in first:
                first.add(p)
                assert version <= PERIOD
    assert first == {"0", "2", "3"}
    assert optimizer.stats().young_rounds == 0


@over_optimizers
def test_start_eigh_changes_no_weight_and_then_refreshes_in_the_background(name: str) -> None:
    optimizer, workers = manual(build(name, RuntimeConfig(start="eigh")))
    params = optimizer.param_groups[0]["params"]
    start = weights(params)
    train(optimizer, [0])
    assert all(same_bits(start[p], weights(params)[p]) for p in ("0", "2", "3"))
    assert optimizer.stats().refreshes == 7
    for step in range(1, 20):
        train(optimizer, [step])
        workers.run_all()
        assert all(step - version <= PERIOD + 2 for (version,) in versions(optimizer))
    assert optimizer.stats().young_rounds == 0
    assert optimizer.stats().refreshes > 7 + 4 * 7


# Parameters that come later


@over_optimizers
def test_a_parameter_that_comes_late_has_versions_of_its_own(name: str) -> None:
    optimizer, workers = manual(build(name))
    params = optimizer.param_groups[0]["params"]
    for step in range(60):
        set_gradients(params, step)
        if step < 23:
            params[2].grad = None
        optimizer.step()
        workers.run_some(random.Random(step))
        own = step - 23 if step >= 23 else 0
        if step >= 23:
            assert int(optimizer.state[params[2]]["step"]) == own
            assert own - int(optimizer.state[params[2]]["version"][0]) <= PERIOD + 2
        assert step - int(optimizer.state[params[0]]["version"][0]) <= PERIOD + 2
    assert own > GROWN


@over_optimizers
def test_a_group_that_is_added_leaves_what_is_in_flight(name: str) -> None:
    optimizer, workers = manual(build(name))
    train(optimizer, range(GROWN + 3))
    flying = optimizer.stats().in_flight
    assert flying
    new = parameters([(4, 4), (6, 4)], seed=1)
    optimizer.add_param_group({"params": new, "precondition_frequency": 5})
    assert optimizer.stats().in_flight == flying
    for step in range(GROWN + 3, GROWN + 40):
        train(optimizer, [step])
        workers.run_some(random.Random(step))
        for p, entries in optimizer.state.items():
            if "version" in entries:
                period = 5 if any(p is q for q in new) else PERIOD
                age = int(entries["step"]) - int(entries["version"].min())
                assert age <= period + 2 or step < GROWN + 6
    assert sorted(map(len, versions(optimizer))) == [1] * 5


@over_optimizers
def test_refreshes_are_spread_over_the_period_by_their_cost(name: str) -> None:
    """No step launches more than its share and one unit."""
    period, shapes = 8, [(12, 12)] * 3 + [(4, 4)] * 40 + [(8, 8)] * 9 + [(12, 4)] * 4
    costs = [sum(size**3 for size in shape) for shape in shapes]
    optimizer, workers = manual(build(name, shapes=shapes, precondition_frequency=period))
    named = {f"parameter {index} of group 0": cost for index, cost in enumerate(costs)}
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = gradient(tuple(p.shape), p.dtype, 0, 0)
    for _ in range(GROWN + period):
        optimizer.step()
    for _ in range(2):
        loads = []
        for _ in range(period):
            del workers.submitted[:]
            optimizer.step()
            loads.append(
                sum(
                    named[job.name.removeprefix("refresh of ").split(" at ")[0]]
                    for job in workers.submitted
                )
            )
        assert sum(loads) == sum(costs)
        assert max(loads) <= sum(costs) / period + max(costs)
