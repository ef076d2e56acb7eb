"""Which steps refresh the eigenbases. Pure functions of the step counter."""

from __future__ import annotations

import math

__all__ = ["is_due", "is_young_step", "young_steps"]

_GROWTH = 1.5


def young_steps(shampoo_beta: float) -> int:
    """Steps during which a factor is young: 8 time constants of its moving average."""
    return round(8 / (1 - shampoo_beta))


def is_young_step(step: int) -> bool:
    """Whether ``step`` is one of 2, 3, 5, 8, 12, 18, ...: geometrically spaced, ratio 1.5."""
    mark = 2
    while mark < step:
        mark = math.ceil(mark * _GROWTH)
    return mark == step


def is_due(step: int, *, period: int, young_until: int) -> bool:
    """Whether the bases are refreshed after the update of ``step`` (from 1).

    Every ``period`` steps; below ``young_until`` also at geometrically spaced ones, because
    freshness is worth most while the factors take shape.
    """
    return step % period == 0 or (step < young_until and is_young_step(step))
