"""The rows of the fault table: what happens in each, and what has to come out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asteria.telemetry.counters import Stats
from benchmarks.fault_injection import (
    BAD_RESULT,
    DIES,
    DIES_TWICE,
    INTERRUPT,
    LAPACK_ALWAYS,
    LAPACK_FLOAT32,
    NONFINITE_FACTOR,
    RAISES,
    SLOW,
)

# What can happen to the training loop.
FORK = "fork by a DataLoader"
LOOP_RAISES = "exception before step()"
CLOSE = "close() in the middle"
GRADIENT = "inf or nan in a gradient"
RELOAD = "saved and loaded in flight"

UNDISTURBED, ALL = "undisturbed", "all of them"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: faults, and how its run compares with the undisturbed one of the same seed."""

    name: str
    jobs: Mapping[str, float] = field(default_factory=dict)
    """Kind of fault -> share of the refreshes it happens to."""
    loop: Mapping[str, float] = field(default_factory=dict)
    """Kind of fault -> share of the steps before which it happens."""
    outcome: Literal["same bits", "within noise"]
    twin: str | None = None
    """Row whose bits this one must have, if both are there."""
    check: str
    """Where the faults were counted, or what was looked at instead."""


def _of_jobs(kind: str, rate: float, check: str, *, exact: bool = False) -> Row:
    outcome: Literal["same bits", "within noise"] = "same bits" if exact else "within noise"
    return Row(name=kind, jobs={kind: rate}, outcome=outcome, check=check)


def _of_loop(kind: str, rate: float, check: str, *, exact: bool = False) -> Row:
    outcome: Literal["same bits", "within noise"] = "same bits" if exact else "within noise"
    return Row(name=kind, loop={kind: rate}, outcome=outcome, check=check)


_SINGLE = [
    _of_jobs(NONFINITE_FACTOR, 0.1, "stats().failures['nonfinite factor']"),
    _of_jobs(LAPACK_FLOAT32, 0.1, "stats().retried_refreshes"),
    _of_jobs(LAPACK_ALWAYS, 0.1, "stats().failures['no basis']"),
    _of_jobs(BAD_RESULT, 0.1, "stats().retried_refreshes"),
    _of_jobs(RAISES, 0.03, "stats().failures['worker raised'], step() again"),
    _of_jobs(DIES, 0.03, "stats().worker_deaths", exact=True),
    _of_jobs(DIES_TWICE, 0.03, "stats().worker_deaths, RefreshError, step() again"),
    _of_jobs(SLOW, 0.3, "waited for, same bits", exact=True),
    _of_jobs(INTERRUPT, 0.02, "caught, step() again", exact=True),
    _of_loop(FORK, 0.01, "every batch arrives", exact=True),
    _of_loop(LOOP_RAISES, 0.01, "caught, stats().steps is less by as many"),
    _of_loop(CLOSE, 0.02, "no worker is left, the next step starts one", exact=True),
    Row(
        name=GRADIENT,
        loop={GRADIENT: 0.01},
        outcome="within noise",
        # The same steps are left out there, without a call of step().
        twin=LOOP_RAISES,
        check="stats().skipped_steps, bits of the row where step() is not called",
    ),
    _of_loop(RELOAD, 0.01, "stats().in_flight before and after", exact=True),
]

ROWS = {
    row.name: row
    for row in (
        Row(name=UNDISTURBED, outcome="same bits", check="-"),
        *_SINGLE,
        Row(
            name=ALL,
            jobs={kind: rate / 2 for row in _SINGLE for kind, rate in row.jobs.items()},
            loop={kind: rate for row in _SINGLE for kind, rate in row.loop.items()},
            outcome="within noise",
            check="each by its counter, as above",
        ),
    )
}


def counted(stats: Stats) -> Counter[str]:
    """What ``stats`` says of faults, by counter."""
    return Counter(
        {
            **{f"failures[{reason!r}]": count for reason, count in stats.failures.items()},
            "retried_refreshes": stats.retried_refreshes,
            "worker_deaths": stats.worker_deaths,
            "skipped_steps": stats.skipped_steps,
        }
    )


def expected(suffered: Mapping[str, int]) -> Counter[str]:
    """The counters that faults of jobs show in, once their refreshes have landed."""
    get = Counter(suffered)
    return +Counter(
        {
            "failures['nonfinite factor']": get[NONFINITE_FACTOR],
            "failures['no basis']": get[LAPACK_ALWAYS],
            # Each refresh that gives up has cost two workers.
            "failures['worker raised']": get[RAISES] + get[DIES_TWICE] // 2,
            "retried_refreshes": get[LAPACK_FLOAT32] + get[BAD_RESULT],
        }
    )


def differences(record: Mapping[str, Any]) -> list[str]:
    """Where the counters of a finished run disagree with what was done to it.

    Dropped are faults of refreshes that were never installed: overtaken by a young refresh, or in
    flight when the optimizer was replaced or the run ended.
    """
    injected, dropped = Counter(record["injected"]), Counter(record["dropped"])
    wanted = expected(injected - dropped)
    wanted["worker_deaths"] = injected[DIES] + injected[DIES_TWICE]
    wanted["skipped_steps"] = injected[GRADIENT]
    found, caught = Counter(record["counted"]), Counter(record["caught"])
    pairs = [(name, wanted[name], found[name]) for name in sorted({*wanted, *found})]
    gave_up = (injected[DIES_TWICE] - dropped[DIES_TWICE]) // 2
    pairs += [
        ("caught WorkerFault", injected[RAISES] - dropped[RAISES], caught["WorkerFault"]),
        ("caught RefreshError", gave_up, caught["RefreshError"]),
        ("caught LoopFault", injected[LOOP_RAISES], caught["LoopFault"]),
        ("caught KeyboardInterrupt", injected[INTERRUPT], caught["KeyboardInterrupt"]),
        ("steps", record["calls"], record["steps"]),
    ]
    return [f"{name}: {has}, not {wants}" for name, wants, has in pairs if has != wants]
