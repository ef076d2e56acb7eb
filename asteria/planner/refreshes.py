"""What it takes to keep the eigenbases fresh: seconds of a round, and the period they allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from asteria.config.hyperparameters import Hyperparameters
from asteria.config.refresh_plan import RefreshPlan
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.method import Method, chosen_method
from asteria.planner.beside import device_round_s, places
from asteria.planner.extents import Routed
from asteria.planner.machine import Machine
from asteria.refresh.pacing import HOST_SHARE, STEP_SHARE, affordable_period
from asteria.refresh.pool import jobs_and_threads
from asteria.runtime.records import Route

__all__ = ["Refreshes", "planned_refreshes", "refreshes_beside"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshes:
    """The cost of refreshes and how often they can be done.

    Seconds are those of host threads; where synchronous refreshes run on an accelerator, they say
    nothing about it.
    """

    factors: Mapping[int, int]
    """Size of a Kronecker factor -> how many the model has, by size."""
    beside: bool
    """Whether worker threads do them beside the training; else the step does."""
    jobs: int
    """Refreshes at a time."""
    threads: int
    """Math threads of each."""
    round_s: float
    """Seconds of work, of one job after another, to refresh once all that the host refreshes."""
    longest_s: float
    """Of that the longest single refresh, which cannot be divided."""
    first_s: float
    """To make the first bases, exact and in float64, on the host's training threads."""
    places: Mapping[str, str]
    """Blocks of which dims who refreshes, beside the training: ``"768x3072": "device ldlr"``. Empty
    where the host does it all. By estimates of what an accelerator takes, which are not measured.
    """
    device_round_s: float
    """Seconds of the device for its part of a round; ``round_s`` is the host's."""
    period: int
    """``precondition_frequency``, in steps; for ``"auto"`` what it begins with."""
    staleness: int
    """Steps from the snapshot to the install."""
    oldest_steps: int
    """Age of a basis at its last use, at most."""
    shortest_step_s: float
    """A step must take at least so long for the host to sustain the period."""
    step_s: float | None
    """What was said that a step takes."""
    sustainable_period: int | None
    """Smallest period that the host sustains at ``step_s``; None if that is not known."""
    needed_staleness: int | None
    """Steps that the longest refresh takes; None if ``step_s`` is not known."""

    @property
    def is_sustainable(self) -> bool | None:
        """Whether the host sustains the period; None if ``step_s`` is not known."""
        return None if self.sustainable_period is None else self.sustainable_period <= self.period


def refreshes_beside(config: RuntimeConfig, machine: Machine) -> tuple[int, int]:
    """(jobs at a time, math threads of each) beside the training; no jobs if the step does it."""
    if config.refresh == "sync" or config.staleness == 0:
        return 0, max(1, machine.cores)
    return jobs_and_threads(config.workers or machine.free_cores)


def planned_refreshes(
    ways: Routed,
    group: Mapping[str, Any],
    config: RuntimeConfig,
    machine: Machine,
    step_s: float | None,
) -> Refreshes:
    """Price a round of refreshes of parameters with these ways, on ``machine``."""
    jobs, threads = refreshes_beside(config, machine)
    method = chosen_method(config.method, start=config.start, first=False)
    plan = places(ways, group, config, machine, jobs=jobs, threads=threads)
    known: dict[int, _Priced] = {}
    counts: Counter[int] = Counter()
    longest_s = round_s = 0.0
    for _, way in ways:
        if id(way) not in known:
            known[id(way)] = _priced(way, machine, threads, method=method, plan=plan)
        priced = known[id(way)]
        counts.update(priced.sizes)
        longest_s = max(longest_s, priced.longest_s)
        round_s += priced.round_s
    first_s = sum(n * machine.seconds(s, machine.cores, method="eigh") for s, n in counts.items())
    at_once, share = (jobs, HOST_SHARE) if jobs else (1, STEP_SHARE)
    period = Hyperparameters.of(group).precondition_frequency
    staleness = config.staleness if jobs else 0
    sustainable = None
    if step_s is not None:
        sustainable = affordable_period(round_s, step_s, jobs=at_once, share=share)
    return Refreshes(
        factors=dict(sorted(counts.items())),
        beside=jobs > 0,
        jobs=at_once,
        threads=threads,
        round_s=round_s,
        longest_s=longest_s,
        first_s=first_s,
        places={"x".join(map(str, dims)): str(choice) for dims, choice in plan.items()},
        device_round_s=device_round_s(ways, plan),
        period=period,
        staleness=staleness,
        oldest_steps=period + staleness,
        shortest_step_s=round_s / (period * at_once * share),
        step_s=step_s,
        sustainable_period=sustainable,
        needed_staleness=None if step_s is None else max(1, math.ceil(longest_s / step_s)),
    )


class _Priced(NamedTuple):
    """Of one parameter; the seconds are those of the host."""

    sizes: Counter[int]
    """Of all factors."""
    round_s: float
    longest_s: float
    """Of one tile, which is refreshed at a time."""


def _priced(
    way: Route, machine: Machine, threads: int, *, method: Method, plan: RefreshPlan
) -> _Priced:
    counts: Counter[int] = Counter()
    longest_s = round_s = 0.0
    for (shape, blocks), number in Counter((t.shape, t.blocks) for t in way.tiles).items():
        tile_s = 0.0
        for size in shape.factor_sizes():
            counts[size] += number * blocks
            tile_s += blocks * machine.seconds(size, threads, method=method)
        if shape.dims in plan and plan[shape.dims].on == "device":
            continue
        longest_s = max(longest_s, tile_s)
        round_s += number * tile_s
    return _Priced(counts, round_s, longest_s)
