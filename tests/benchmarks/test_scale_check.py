from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks import scale_check
from benchmarks.scale_run import (
    ADAMW,
    EVERY,
    NEVER_REFRESHED,
    SHARDS,
    SHARED,
    Case,
    Found,
    Times,
    run_together,
)

CASE = Case(steps=20, period=10, shapes=((64, 8), (64, 8)), device_s=0.001)


def times(step: float, update: float, refreshes: int = 0, peak: float = 0.0) -> Times:
    rounds = [update + peak * (n % 10 == 9) for n in range(20)]
    steps = [step + peak * (n % 10 == 9) for n in range(20)]
    return Times(steps, [step - update] * 20, rounds, refreshes)


def made(count: int) -> list[Found]:
    """What perfect processes would find: 10 ms of a device, 1 ms of an update, rounds of 8 ms."""
    found = {
        (ADAMW, 0): times(0.0101, 0.0001),
        (NEVER_REFRESHED, 0): times(0.011, 0.001),
        (EVERY, 0): times(0.011, 0.001, 8, 0.008),
        (SHARED, 0): times(0.011, 0.001, 8 // count, 0.008 / count),
        (SHARED, 2): times(0.011, 0.001, 8 // count),
    }
    if count > 1:
        found[SHARDS, 0] = times(0.0105, 0.0005, 4, 0.004)
    refused = {(SHARDS, 2): "no shards"} if count > 1 else {}
    return [Found(found, refused, small_s=1e-5, large_s=1.1e-4) for _ in range(count)]


def test_predictions_of_one_process_are_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_check, "run_together", lambda count, case: made(count))
    monkeypatch.setattr(scale_check, "Case", lambda steps: dataclasses.replace(CASE, steps=steps))
    monkeypatch.setattr(scale_check, "describe_machine", lambda: {"cores": 8})
    report = scale_check.compare([1, 2], steps=20)
    assert report["error"] is None
    assert [row["ratio"] for row in report["rows"][:4]] == pytest.approx([1.0] * 4, rel=0.01)
    assert [row["shared"] for row in report["rows"]] == [False] * 6 + [True] * 3
    text = scale_check.text_of(report)
    # Two passes over two processes, and half of a round each.
    predicted = [row["predicted_s"] for row in report["rows"][4:]]
    expected = [0.0102, 0.0119, 0.0115, 0.0111, 0.0110]
    assert predicted == pytest.approx(expected, rel=0.02)
    assert "Asteria, exact shards, S = 2 is refused by this version: no shards" in text
    assert "| Asteria, replicas | 2 | 2 | shared |" in text


def test_more_processes_than_cores_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_check, "run_together", lambda count, case: made(count))
    rates = scale_check.rates_of({1: made(1), 2: made(2)}, CASE)
    key = (EVERY, 0)
    few = scale_check.predict(CASE, rates, 4, key, shared=False, cores=4)
    many = scale_check.predict(CASE, rates, 4, key, shared=False, cores=1)
    assert many - few == pytest.approx(3 * (0.001 + 0.0008), rel=0.05)


def test_what_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(count: int, case: Case) -> list[Found]:
        if count == 4:
            raise RuntimeError("no more processes")
        return made(count)

    monkeypatch.setattr(scale_check, "run_together", broken)
    monkeypatch.setattr(scale_check, "Case", lambda steps: dataclasses.replace(CASE, steps=steps))
    report = scale_check.compare([1, 4], steps=20)
    assert {row["ranks"] for row in report["rows"]} == {1}
    assert "RuntimeError: no more processes" in scale_check.text_of(report)
    assert scale_check.compare([], steps=20)["rows"] == []


def test_bursts_go_by() -> None:
    assert scale_check.quiet([0.1, 0.2, 0.1, 0.9, 0.5, 0.3], 2) == [0.1, 0.2]


def test_real_processes_train_all_ways() -> None:
    case = dataclasses.replace(CASE, steps=2, period=2, warm_periods=1)
    found = run_together(2, case)
    assert len(found) == 2
    for rank in found:
        assert set(rank.times) | set(rank.refused) == set(case.ways(2))
        assert {way for way, _ in rank.refused} <= {SHARDS}
        assert rank.small_s > 0
        assert rank.large_s > 0
        for way in rank.times.values():
            assert len(way.steps_s) == len(way.device_s) == len(way.update_s) == 2
            assert all(map(math.isfinite, way.steps_s))
            assert min(way.device_s) >= case.device_s
    assert [rank.times[EVERY, 0].refreshes for rank in found] == [4, 4]
    assert all(rank.times[NEVER_REFRESHED, 0].refreshes == 0 for rank in found)
