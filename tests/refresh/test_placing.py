"""Who refreshes what, given what it costs."""

import math
from dataclasses import replace

import pytest

from asteria.config.refresh_plan import Choice
from asteria.refresh.costs import device_seconds, host_seconds, update_seconds
from asteria.refresh.pacing import HOST_SHARE, STEP_SHARE
from asteria.refresh.placing import Kind, Means, choose

MEANS = Means(step_s=1.0, jobs=4)
"""Two worker seconds a step, and 0.2 of the device's."""


def kind(
    size: int, host_s: float, device_s: float, units: int = 1, period: int | None = 10
) -> Kind:
    return Kind(
        dims=(size, size),
        units=units,
        host_s=host_s,
        device_s={"ldlr": device_s, "qr": 2 * device_s},
        period=period,
    )


def places(kinds: list[Kind], means: Means = MEANS) -> list[str]:
    return [choice.on for choice in choose(kinds, means)]


def test_the_host_does_what_it_can() -> None:
    """Its time is free, however little the device would need."""
    assert places([kind(8, 10.0, 1e-6), kind(16, 10.0, 1e-6)]) == ["host", "host"]
    assert choose([kind(8, 1.0, 1.0)], MEANS) == [Choice("host", "qr")]


def test_what_it_cannot_goes_to_the_device_dearest_first() -> None:
    """A round of 20 worker seconds is what there is."""
    small, large = kind(8, 15.0, 0.5), kind(16, 15.0, 0.1)
    assert places([small, large]) == ["host", "device"]
    assert places([large, small]) == ["device", "host"]
    assert places([small, large, kind(32, 1.0, 1e-9)]) == ["host", "device", "device"]


def test_a_kind_goes_as_a_whole_to_where_it_is_quickest() -> None:
    both = Kind(dims=(8, 8), units=7, host_s=100.0, device_s={"qr": 0.01, "ldlr": 0.02}, period=10)
    assert choose([both], MEANS) == [Choice("device", "qr")]


def test_what_is_too_much_for_both_goes_where_a_step_loses_least() -> None:
    """The host would make it wait for 2 seconds, with four jobs at a time."""
    assert places([kind(8, 100.0, 2.1)]) == ["device"]
    assert places([kind(8, 100.0, 21.0)]) == ["device"]
    assert places([kind(8, 100.0, 23.0)]) == ["host"]
    assert places([kind(8, 100.0, 1.9), kind(16, 100.0, 0.5)]) == ["device", "device"]


def test_what_has_no_room_on_the_device_stays_with_the_host() -> None:
    assert places([replace(kind(8, 100.0, 0.01), device_s={})]) == ["host"]
    assert places([]) == []


def test_a_free_period_is_the_shortest_that_both_sustain() -> None:
    kinds = [kind(8, 8.0, 2.0, period=None), kind(16, 8.0, 0.1, period=None)]
    assert choose(kinds, MEANS) == [Choice("host", "qr", 4), Choice("device", "ldlr", 1)]
    assert choose(kinds, Means(step_s=1.0, jobs=1)) == [Choice("device", "ldlr", 11)] * 2
    assert choose(kinds, Means(step_s=100.0, jobs=4)) == [Choice("host", "qr", 1)] * 2


def test_fixed_kinds_leave_less_to_free_ones() -> None:
    fixed = kind(8, 10.0, 10.0, period=10)
    free = replace(kind(16, 4.0, 10.0), period=None)
    assert [choice.period for choice in choose([fixed, free], MEANS)] == [None, 4]
    full = kind(8, 20.0, 10.0, period=10)
    assert choose([full, free], MEANS)[1] == Choice("device", "ldlr", 50)


def test_the_choice_depends_on_nothing_else() -> None:
    kinds = [kind(n, 5.0, 0.2, units=2) for n in (8, 16, 32)]
    first = choose(kinds, MEANS)
    assert first == choose(list(kinds), replace(MEANS))
    assert [choice.on for choice in first] == ["device", "host", "host"], "equals in order"


@pytest.mark.parametrize("step_s", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize("period", [1, 10, 10**6])
def test_no_choice_loses_more_than_one_place_for_all(step_s: float, jobs: int, period: int) -> None:
    means = Means(step_s=step_s, jobs=jobs)
    sizes = (256, 512, 1024, 2048, 4096)
    costs = [
        (host_seconds(n, 1, method="qr"), device_seconds(n, method="ldlr", speed=1.0))
        for n in sizes
    ]
    asked = [kind(n, *cost, 12, period) for n, cost in zip(sizes, costs, strict=True)]

    def lost_s(on: list[str]) -> float:
        pairs = list(zip(asked, on, strict=True))
        device = sum(k.units * k.device_s["ldlr"] for k, place in pairs if place != "host")
        host = sum(k.units * k.host_s for k, place in pairs if place == "host")
        late_s = max(0.0, host / period / jobs - step_s * HOST_SHARE)
        return late_s + max(0.0, device / period - step_s * STEP_SHARE)

    found = lost_s(places(asked, means))
    assert found <= min(lost_s(["host"] * 5), lost_s(["device"] * 5)) + 1e-12


def test_costs_grow_with_the_size_and_fall_with_the_speed() -> None:
    for method in ("qr", "ldlr"):
        seconds = [device_seconds(n, method=method, speed=1.0) for n in (100, 256, 1500, 9000)]
        assert seconds == sorted(seconds)
        half = device_seconds(256, method=method, speed=0.5)
        assert half == pytest.approx(2 * seconds[1])
        assert host_seconds(512, 2, method=method) == host_seconds(512, 1, method=method) / 2
    assert host_seconds(512, 1, method="ldlr") > host_seconds(512, 1, method="qr")
    assert math.isclose(update_seconds((64, 32), (64, 32), speed=1.0), 6 * 64 * 32 * 96 / 25e12)
    assert update_seconds((5,), (), speed=1.0) == 0
