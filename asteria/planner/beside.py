"""Which blocks an accelerator will refresh beside the training, by the rule of the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asteria.config.hyperparameters import FIRST_PERIOD
from asteria.config.refresh_plan import Choice, RefreshPlan
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.method import Method
from asteria.planner.extents import Routed
from asteria.planner.machine import Machine
from asteria.refresh.costs import device_seconds
from asteria.refresh.placing import Means, choose
from asteria.runtime.placer import modelled_kind, modelled_step_s
from asteria.runtime.records import TilePlan

__all__ = ["device_round_s", "places"]

_SPEED = 1.0
"""Of an accelerator that the tables are for; a plan does not ask which one it will be."""


def places(
    ways: Routed,
    group: Mapping[str, Any],
    config: RuntimeConfig,
    machine: Machine,
    *,
    jobs: int,
    threads: int,
) -> RefreshPlan:
    """By the dims of blocks who refreshes them; empty where the host refreshes all.

    What is measured at run time (``precondition_frequency="auto"``) is taken from tables here.
    """
    kinds = _by_dims(ways)
    if machine.shares_memory or not jobs or config.method == "eigh":
        return {}
    if config.refresh_on == "device":
        method = "ldlr" if config.method == "auto" else config.method
        return {dims: Choice("device", method) for dims in kinds}
    if config.refresh_on == "host":
        return {}
    period = group["precondition_frequency"]
    asked = [
        modelled_kind(
            plans,
            config,
            threads=threads,
            speed=_SPEED,
            memory_bytes=machine.device_bytes,
            period=FIRST_PERIOD if period == "auto" else period,
        )
        for plans in kinds.values()
    ]
    step_s = modelled_step_s([plan for plans in kinds.values() for plan in plans], _SPEED)
    choices = choose(asked, Means(step_s=step_s, jobs=jobs))
    found = dict(zip(kinds, choices, strict=True))
    return found if any(choice.on == "device" for choice in choices) else {}


def device_round_s(ways: Routed, plan: RefreshPlan) -> float:
    """Seconds of the device to refresh once all that it refreshes, by the tables."""
    seconds = 0.0
    for dims, plans in _by_dims(ways).items():
        if dims in plan and plan[dims].on == "device":
            method: Method = plan[dims].method
            sizes = plans[0].shape.factor_sizes()
            one = sum(device_seconds(size, method=method, speed=_SPEED) for size in sizes)
            seconds += one * sum(tile.blocks for tile in plans)
    return seconds


def _by_dims(ways: Routed) -> dict[tuple[int, ...], list[TilePlan]]:
    kinds: dict[tuple[int, ...], list[TilePlan]] = {}
    for _, way in ways:
        for plan in way.tiles:
            if way.rule.has_bases and plan.shape.factor_sizes():
                kinds.setdefault(plan.shape.dims, []).append(plan)
    return kinds
