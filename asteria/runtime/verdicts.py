"""Which bases that a device has computed can be used, as the host learns of it afterwards.

The device itself keeps the basis in use where a new one cannot be used, so that the host need not
know. What the host counts on meanwhile (a version, an install) it takes back when it learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asteria.runtime.records import ParameterRecord
from asteria.runtime.reports import Report
from asteria.runtime.units import Unit, Units
from asteria.telemetry.counters import Counters

__all__ = ["Verdicts"]

_REASON = "no basis on the device"


@dataclass(slots=True)
class _Expected:
    unit: Unit
    report: Report
    before: int
    """Version of the basis that was in use."""
    version: int
    """Of those that have taken its place, as far as they can be used."""
    told: Callable[[], None]


class Verdicts:
    """Tells `Units` and the counters what devices find out. For the training thread."""

    def __init__(self, counters: Counters, units: Units) -> None:
        self._counters = counters
        self._units = units
        self._expected: list[_Expected] = []

    def expect(
        self,
        unit: Unit,
        report: Report,
        *,
        before: int,
        version: int,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        """A refresh of ``unit`` is taken for a success until ``report``, one flag a basis, comes.

        ``told`` is called then.
        """
        self._expected.append(_Expected(unit, report, before, version, told))

    def collect(self, *, wait: bool) -> None:
        """Take note of what has arrived, or of everything, which waits for the devices."""
        left = []
        for expected in self._expected:
            flags = expected.report.read(wait=wait)
            if flags is None:
                left.append(expected)
            else:
                self._judge(expected, bases=flags.numel(), usable=int(flags.sum()))
                expected.told()
        self._expected = left

    def _judge(self, expected: _Expected, *, bases: int, usable: int) -> None:
        unit, failed = expected.unit, bases - usable
        self._counters.installs -= failed
        if not usable:
            self._units.kept(unit, before=expected.before, version=expected.version)
        self._units.judge(unit, [_REASON] * failed)

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        gone = set(records)
        self._expected = [e for e in self._expected if e.unit.record not in gone]
