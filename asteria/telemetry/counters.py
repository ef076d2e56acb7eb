"""Counters of one optimizer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an optimizer has done since it was made; `optimizer.stats()` returns one."""

    steps: int
    """Calls of step(), skipped ones included."""
    skipped_steps: int
    """Steps that changed nothing because a gradient was not finite."""
    refreshes: int
    """Eigenbases computed, the first ones included."""
    failed_refreshes: int
    """Eigenbases that were not finite or not orthogonal; the one in use was kept."""
