"""What the planner says of refreshes on an accelerator is what the runtime would do."""

from typing import Any

import pytest

import asteria
from asteria import RuntimeConfig
from asteria.config.refresh_plan import KEY, plan_text, read_plan
from asteria.planner.machine import Machine
from asteria.planner.plan import Plan
from asteria.runtime import choices, placer
from tests.support.sides import DeferredSide, beside
from tests.support.training import Shape, parameters, train

SHAPES: list[Shape] = [(48, 32), (64, 64), (48, 32), (7,)]
GPU = Machine(device_bytes=80 * 10**9, host_bytes=10**11, cores=4, training_threads=2)


def planned(model: Any = "gpt2", machine: Machine = GPU, **options: Any) -> Plan:
    runtime = {
        key: options.pop(key)
        for key in ("refresh_on", "refresh_method", "workers", "staleness")
        if key in options
    }
    return asteria.plan(model, machine=machine, runtime=RuntimeConfig(**runtime), **options)


def test_the_device_does_all_if_it_is_told_to() -> None:
    fresh = planned(refresh_on="device").refreshes
    assert set(fresh.places.values()) == {"device ldlr"}
    assert fresh.round_s == fresh.longest_s == 0
    assert fresh.device_round_s > 0
    assert sum(fresh.factors.values()) > 0
    slower = planned(refresh_on="device", refresh_method="qr").refreshes
    assert set(slower.places.values()) == {"device qr"}
    assert slower.device_round_s > fresh.device_round_s


@pytest.mark.parametrize(
    "options",
    [
        {"refresh_on": "host"},
        {"refresh_method": "eigh"},
        {"staleness": 0},
        {"machine": Machine()},
        {"machine": Machine(), "refresh_on": "device"},
    ],
    ids=str,
)
def test_the_host_does_all_where_nothing_else_is_wanted(options: dict[str, Any]) -> None:
    fresh = planned(**options).refreshes
    assert fresh.places == {}
    assert fresh.device_round_s == 0
    assert fresh.round_s > 0


def test_what_is_left_to_us_is_told_with_its_cost() -> None:
    plan = planned(precondition_frequency=1)
    fresh = plan.refreshes
    there = [dims for dims, place in fresh.places.items() if place.startswith("device")]
    assert there
    assert fresh.round_s < planned(refresh_on="host").refreshes.round_s
    assert fresh.device_round_s > 0
    text = str(plan)
    assert f"{there[0]} device ldlr" in text
    assert "by estimates that nobody has measured" in text
    assert "a round on the device: " in text
    assert plan.to_dict()["refreshes"]["places"] == fresh.places


def test_a_host_that_is_too_slow_is_told_of_the_device() -> None:
    slow = {"precondition_frequency": 1, "step_s": 0.1}
    advice = 'refresh_on="auto" or "device"'
    assert any(advice in text for text in planned(refresh_on="host", **slow).suggestions)
    assert not any(advice in text for text in planned(**slow).suggestions)
    without = planned(machine=Machine(), refresh_on="host", **slow)
    assert not any(advice in text for text in without.suggestions)


def test_nothing_is_sent_where_nothing_is_refreshed_by_the_host() -> None:
    assert planned(refresh_on="device").traffic.link_bytes == 0
    assert planned(refresh_on="host").traffic.link_bytes > 0


@pytest.mark.parametrize("period", [1, 10, 1000])
def test_the_runtime_decides_the_same(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choices, placer):
        monkeypatch.setattr(module, "is_accelerator", lambda device: True)
    optimizer = asteria.SOAP(
        parameters(SHAPES), precondition_frequency=period, runtime=RuntimeConfig(workers=1)
    )
    with beside(optimizer, DeferredSide()):
        train(optimizer, range(2))
        decided = read_plan(optimizer.param_groups[0][KEY])
    told = planned(SHAPES, workers=1, precondition_frequency=period).refreshes.places
    if told:
        assert plan_text(decided) == "; ".join(f"{k} {v}" for k, v in told.items())
    else:
        assert {choice.on for choice in decided.values()} == {"host"}
