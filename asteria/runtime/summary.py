"""One record of what all parts of an engine have counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from asteria.runtime.background import BackgroundRefresher
from asteria.runtime.extents import Extent
from asteria.runtime.governor import Governor
from asteria.runtime.residence import Residence
from asteria.runtime.units import Units
from asteria.store.layout import Life
from asteria.telemetry.counters import Counters, Network, Stats

__all__ = ["summarize"]


def summarize(
    counted: Counters,
    units: Units,
    background: BackgroundRefresher | None,
    governor: Governor,
    residence: Residence,
    network: Network,
    extents: Iterable[Extent],
) -> Stats:
    """What was done so far, as far as devices have told."""
    failures = dict(counted.failures)
    pipeline = None if background is None else background.pipeline
    return Stats(
        steps=counted.steps,
        skipped_steps=counted.skipped_steps,
        refreshes=counted.refreshes,
        refresh_cost=counted.refresh_cost,
        factor_bytes=sum(cell.nbytes for extent in extents for cell in extent.cells_of([Life.SUM])),
        installs=counted.installs,
        failed_refreshes=sum(failures.values()),
        failures=failures,
        retried_refreshes=counted.retried_refreshes,
        worker_deaths=pipeline.executor.deaths if pipeline is not None else 0,
        in_flight=len(pipeline) if pipeline is not None else 0,
        staleness={shape: dict(ages) for shape, ages in units.ages().items()},
        waits=pipeline.waits.count if pipeline is not None else 0,
        wait_s=pipeline.waits.seconds if pipeline is not None else 0.0,
        update_s=counted.update_s,
        refresh_s=counted.refresh_s,
        install_s=counted.install_s,
        worker_s=counted.worker_s,
        device_s=counted.device_s,
        host_utilization=background.launcher.utilization() if background else 0.0,
        sustainable_period=governor.affordable_period(),
        young_rounds=len(counted.young_steps),
        tier_bytes=residence.bytes_at,
        tier_peak_bytes=residence.peak_bytes_at,
        traffic=replace(residence.traffic),
        network=network,
    )
