"""Decides what the host can afford, once, from what its first refreshes have cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from asteria.config.hyperparameters import Hyperparameters, check_group
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError
from asteria.refresh.pacing import (
    HOST_SHARE,
    STEP_SHARE,
    Pace,
    affordable_period,
    young_stride,
)
from asteria.refresh.schedule import is_young_step, young_steps
from asteria.runtime.records import ParameterRecord
from asteria.runtime.units import Unit, Units

__all__ = ["Governor"]

_DECIDE_AFTER = 24
"""Steps that are measured before ``precondition_frequency="auto"`` becomes a number."""
_WAITING_SHARE = 0.05
"""Of the time, above which waits at the bound are worth a warning."""
_WAITING_S = 2.0
"""Below it in all, nobody is bothered with waits."""


class Governor:
    """Sets the period and the young rounds of groups that leave them to us, and warns of waits.

    What is decided goes into the groups, hence into checkpoints, and stays. With several processes
    nothing is decided: each would decide for itself. For the training thread.
    """

    def __init__(self, config: RuntimeConfig, units: Units, *, jobs: int) -> None:
        """``jobs``: refreshes that are computed beside the training at a time; 0 if none are."""
        self.pace = Pace()
        self._config = config
        self._units = units
        self._jobs = jobs
        self._parameters = 0
        self._measured_steps = 0
        """Since there are so many parameters."""
        self._rounds = 0
        self._period = 1
        self._warned = False
        self._waited_s = 0.0

    def begin_step(
        self, groups: list[dict[str, Any]], now_s: float, *, shared: bool = False
    ) -> None:
        """Look at what is known and decide what is due; groups are changed in place.

        Raises ConfigError for what the clock would decide, where several processes share the work.
        """
        self.pace.begin_step(now_s)
        periods = [group["precondition_frequency"] for group in groups]
        if shared:
            self._refuse_the_clock(periods)
            return
        parameters = sum(len(group["params"]) for group in groups)
        self._measured_steps = self._measured_steps + 1 if parameters == self._parameters else 0
        self._parameters = parameters
        self._price_young_rounds(groups)
        if "auto" in periods and self._measured_steps >= _DECIDE_AFTER:
            period = self.affordable_period()
            for group in groups:
                if period and group["precondition_frequency"] == "auto":
                    group["precondition_frequency"] = period
        self._period = max([p for p in periods if p != "auto"], default=1)

    def _refuse_the_clock(self, periods: list[object]) -> None:
        if "auto" in periods:
            raise ConfigError(
                'precondition_frequency="auto" was asked for, found other processes that train the '
                "same parameters: each would decide for itself by its own clock, and their "
                "weights would drift apart; give a number of steps"
            )

    def affordable_period(self) -> int:
        """Smallest period that the host can sustain, 0 if not enough is known."""
        pace = self.pace
        if self._jobs:
            if pace.seen_units < min(len(self._units), 1 + len(self._units) // 2):
                return 0
            seconds, jobs, share = pace.round_s(len(self._units)), self._jobs, HOST_SHARE
        elif not pace.rounds_s:
            return 0
        else:
            seconds, jobs, share = statistics.median(pace.rounds_s), 1, STEP_SHARE
        return affordable_period(seconds, pace.step_s, jobs=jobs, share=share)

    def _price_young_rounds(self, groups: list[dict[str, Any]]) -> None:
        """Leave young rounds out where they would take too much of the first steps' time."""
        if self._config.start != "fresh" or self.pace.count_of_rounds == self._rounds:
            return
        self._rounds = self.pace.count_of_rounds
        round_s, step_s = self.pace.rounds_s[-1], self.pace.step_s
        for number, group in enumerate(groups):
            check_group(group, f"group {number}", scheduled=True)
            steps = young_steps(Hyperparameters.of(group).shampoo_beta)
            rounds = sum(map(is_young_step, range(steps)))
            stride = young_stride(round_s, step_s, rounds=rounds, steps=steps)
            if stride > group.get("young_stride", 1):
                group["young_stride"] = stride
                self._units.notify(
                    f"a round of refreshes inside the step takes {round_s:.0f} s here, and "
                    f"start='fresh' wants {rounds} of them in the first {steps} steps: only every "
                    f"{stride}th is done (group option young_stride, kept in checkpoints). "
                    "Smaller blocks (large_dims='blocks' with a smaller max_precond_dim) are "
                    "cheaper; start='adam' does without"
                )

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        for record in records:
            for ordinal in range(len(record.route.tiles)):
                self.pace.forget(Unit(record, ordinal))

    def waited(self, seconds: float, *, overdue_s: float) -> None:
        """The step has waited so long, ``overdue_s`` of it for refreshes that had all S steps.

        Warns once, at the next step, if the latter recurs.
        """
        self.pace.waited(seconds, overdue_s=overdue_s)
        self._waited_s += overdue_s
        share = self.pace.waiting_share
        if not self._warned and share > _WAITING_SHARE and self._waited_s > _WAITING_S:
            self._warned = True
            period = self.affordable_period()
            advice = (
                f"It could sustain precondition_frequency={period}"
                if period > self._period
                else "It could sustain this period, but single refreshes take longer than that: "
                "a higher staleness helps"
            )
            self._units.notify(
                f"step() spends {share:.0%} of the time waiting for refreshes that the host does "
                f"not finish in {self._config.staleness} steps. {advice}; more workers or "
                "refresh='sync' are other ways out. This is said once; see optimizer.stats()"
            )
