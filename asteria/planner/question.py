"""What a plan is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asteria.algorithms.algorithm import Algorithm
from asteria.config.runtime import RuntimeConfig
from asteria.planner.machine import Machine
from asteria.planner.weights import Weight

__all__ = ["Question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A model, an optimizer's rule and options, the runtime's settings and a machine."""

    model: str
    """What it is called."""
    weights: list[Weight]
    rule: Algorithm
    group: Mapping[str, Any]
    """All options of a parameter group of the optimizer."""
    config: RuntimeConfig
    machine: Machine
    step_s: float | None = None
    """Seconds of a step without refreshes; None is not known."""
