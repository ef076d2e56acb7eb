"""What is refreshed together, and what is remembered of it from one refresh to the next."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from asteria.errors import RefreshError
from asteria.refresh.schedule import phases
from asteria.runtime.records import ParameterRecord, Tile
from asteria.telemetry.counters import Counters

__all__ = ["Memory", "Unit", "Units", "unit_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One tile of a parameter, all its blocks and modes."""

    record: ParameterRecord
    ordinal: int

    def __str__(self) -> str:
        several = len(self.record.route.tiles) > 1
        return f"{self.record.name}, tile {self.ordinal}" if several else self.record.name


def unit_of(tile: Tile) -> Unit:
    """The unit that a tile is."""
    return Unit(tile.record, tile.plan.ordinal)


@dataclass(slots=True)
class Memory:
    """Of one unit; lost with the optimizer."""

    phase: float = 0.0
    """Place of its refreshes within the period, 0 to 1."""
    turned: float = 0.0
    """How far the latest refresh has turned the basis, 0 to 1."""
    failed_in_a_row: int = 0
    used_from: int = 1
    """First update that used the basis in use."""
    attempted: int = 0
    """Version of the latest refresh that left every basis as it was."""


class Units:
    """Versions, phases, ages and failures of all units. For the training thread."""

    def __init__(self, counters: Counters, *, max_failures: int) -> None:
        self._counters = counters
        self._max_failures = max_failures
        self._memories: dict[Unit, Memory] = {}
        self._replacements: list[tuple[Unit, int, int]] = []
        """(unit, version before, version after) since `begin_step`."""
        self._told = False
        self._notices: list[str] = []
        self._error: RefreshError | None = None

    def __len__(self) -> int:
        return len(self._memories)

    def __getitem__(self, unit: Unit) -> Memory:
        return self._memories[unit]

    def admit(self, records: Iterable[ParameterRecord]) -> None:
        """Spread the units of ``records``, which are all that have state, over the period.

        In whichever process: the schedule is the one of a single process that has all of them.
        """
        owners = [
            (Unit(record, plan.ordinal), plan.refresh_cost)
            for record in sorted(records, key=lambda record: record.index)
            if record.route.rule.has_bases
            for plan in record.route.tiles
        ]
        spread = phases([cost for _, cost in owners])
        for (unit, _), phase in zip(owners, spread, strict=True):
            if not unit.record.is_here:
                continue
            memory = self._memories.get(unit)
            if memory is None:
                memory = self._memories[unit] = Memory(used_from=unit.record.steps + 1)
            memory.phase = phase

    def discard(self, records: Iterable[ParameterRecord]) -> None:
        """Forget the units of ``records``."""
        gone = set(records)
        for unit in [unit for unit in self._memories if unit.record in gone]:
            self._count_ages(unit, self._counters.staleness, unit.record.steps)
            del self._memories[unit]

    def replaced(self, unit: Unit, version: int, *, last_use: int) -> None:
        """A basis of ``version`` took the place of one whose last update was ``last_use``."""
        self._count_ages(unit, self._counters.staleness, last_use)
        self._memories[unit].used_from = last_use + 1
        self._replacements.append((unit, unit.record.versions[unit.ordinal], version))
        unit.record.set_version(unit.ordinal, version)

    def installed(self, unit: Unit, version: int) -> None:
        """A basis of ``version`` is used from the next update on; this is never taken back."""
        self._count_ages(unit, self._counters.staleness, unit.record.steps)
        self._memories[unit].used_from = unit.record.steps + 1
        unit.record.set_version(unit.ordinal, version)

    def kept(self, unit: Unit, *, before: int, version: int) -> None:
        """Bases of ``version`` were taken for installed, and turn out to be those of ``before``."""
        self._memories[unit].attempted = max(self._memories[unit].attempted, version)
        if unit.record.versions[unit.ordinal] == version:
            unit.record.set_version(unit.ordinal, before)

    def begin_step(self) -> Callable[[], None]:
        """How to take back what `replaced` is told from now to the next step."""
        replacements: list[tuple[Unit, int, int]] = []
        self._replacements = replacements

        def undo() -> None:
            for unit, before, after in replacements:
                if unit.record.versions[unit.ordinal] == after:
                    unit.record.set_version(unit.ordinal, before)

        return undo

    def ages(self) -> dict[str, Counter[int]]:
        """Ages of all bases in all updates so far, by block shape."""
        table = {shape: ages.copy() for shape, ages in self._counters.staleness.items()}
        for unit in self._memories:
            self._count_ages(unit, table, unit.record.steps)
        return table

    def _count_ages(self, unit: Unit, table: dict[str, Counter[int]], last_use: int) -> None:
        version = unit.record.versions[unit.ordinal]
        ages = range(self._memories[unit].used_from - version, last_use - version + 1)
        shape = "x".join(map(str, unit.record.route.tiles[unit.ordinal].shape.dims))
        table.setdefault(shape, Counter()).update(ages)

    def latest(self, unit: Unit) -> int:
        """Version of the latest refresh that came to its end, successful or not."""
        return max(unit.record.versions[unit.ordinal], self._memories[unit].attempted)

    def judge(self, unit: Unit, reasons: Sequence[str]) -> None:
        """Count the bases that a refresh has kept; `report` tells of it at the next step."""
        counters, memory = self._counters, self._memories[unit]
        if not reasons:
            memory.failed_in_a_row = 0
            return
        kept = ", ".join(dict.fromkeys(reasons))
        if not self._told:
            self._told = True
            self.notify(
                f"a refresh of {unit} failed ({kept}): its eigenbasis stays in use. Later failures "
                f"are only counted, see optimizer.stats(); after {self._max_failures} in a row "
                "RefreshError is raised"
            )
        counters.failures.update(reasons)
        memory.failed_in_a_row += 1
        if memory.failed_in_a_row >= self._max_failures:
            memory.failed_in_a_row = 0
            self._error = RefreshError(
                f"{self._max_failures} refreshes of {unit} in a row failed ({kept}); weights and "
                "state are as the last step left them. Gradients so large that their squares "
                "overflow are a usual cause: look at their norm, clip them, or start this "
                "parameter afresh with `del optimizer.state[parameter]`"
            )

    def notify(self, text: str) -> None:
        """Warn with this text at the next step, before it changes anything."""
        self._notices.append(text)

    def report(self) -> None:
        """Warn, or raise RefreshError, for what went wrong since the last call."""
        notices, self._notices = self._notices, []
        for notice in notices:
            warnings.warn(notice, RuntimeWarning, stacklevel=7)
        error, self._error = self._error, None
        if error is not None:
            raise error
