"""Which steps refresh the eigenbases. Pure functions of the step counter."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["is_due", "is_young_step", "phases", "young_steps"]

_GROWTH = 1.5


def young_steps(shampoo_beta: float) -> int:
    """Steps during which a factor is young: 8 time constants of its moving average."""
    return round(8 / (1 - shampoo_beta))


def is_young_step(step: int, stride: int = 1) -> bool:
    """Whether ``step`` is one of 2, 3, 5, 8, 12, 18, ...: geometrically spaced, ratio 1.5.

    With a ``stride`` of k only every k-th of them is.
    """
    mark, index = 2, 0
    while mark < step:
        mark, index = math.ceil(mark * _GROWTH), index + 1
    return mark == step and index % stride == 0


def is_due(step: int, *, period: int, phase: float = 0.0, version: int | None = None) -> bool:
    """Whether a unit is refreshed after its update of ``step`` (from 1).

    Every ``period`` steps, at the ``phase`` (0 to 1) of the period, 0 being its end; and whenever
    the ``version`` of its basis, if given, is a period old, because the period or the phase has
    changed.
    """
    if (step + int(phase * period)) % period == 0:
        return True
    return version is not None and step - version >= period


def phases(costs: Sequence[float]) -> list[float]:
    """Phase of each unit such that equal parts of the period cost the same; in order, from 0."""
    total = sum(costs)
    done = 0.0
    result = []
    for cost in costs:
        result.append(done / total if total else 0.0)
        done += cost
    return result
