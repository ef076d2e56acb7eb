"""New bases start their way to the device behind the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from asteria.hooks.gradients import GradientHooks
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.records import ParameterRecord
from asteria.runtime.transfer import Link, in_memory, link_to
from asteria.runtime.units import Unit

__all__ = ["Stager"]


class Stager:
    """Moves results to the device of their parameter, early where a hook says that it is time.

    For the training thread, and for `GradientHooks` while that one is in the backward pass.
    """

    def __init__(self, pipeline: Pipeline[Unit, Refreshed]) -> None:
        self._pipeline = pipeline
        self._staged: dict[Flight[Refreshed], list[Tensor | None]] = {}
        self._links: dict[torch.device, Link] = {}
        self._records: dict[int, ParameterRecord] = {}
        """Those whose gradients are announced, by the identity of the parameter."""
        self._hooks = GradientHooks(self, Stager._announced)

    def link(self, device: torch.device) -> Link:
        """The way between the host and ``device``."""
        link = self._links.get(device)
        if link is None:
            link = self._links[device] = link_to(device)
        return link

    def watch(self, record: ParameterRecord) -> None:
        """Stage what the record installs next as soon as its gradient is final."""
        if self.link(record.device).travels:
            self._records[id(record.parameter)] = record
            self._hooks.watch(record.parameter)

    def unwatch(self, record: ParameterRecord) -> None:
        """The record has no state any more."""
        if self._records.pop(id(record.parameter), None) is not None:
            self._hooks.unwatch(record.parameter)

    def _announced(self, parameter: Tensor) -> None:
        """A gradient is final: start the transfer of what the next update installs.

        May come any number of times for an update, or never. Never waits.
        """
        record = self._records.get(id(parameter))
        if record is None:
            return
        for ordinal in range(len(record.route.tiles)):
            for flight in self._pipeline.ready(Unit(record, ordinal), record.steps):
                if flight not in self._staged and _travels(flight):
                    self._staged[flight] = self._stage(flight, self.link(record.device))

    def _stage(self, flight: Flight[Refreshed], link: Link) -> list[Tensor | None]:
        bases = flight.job.outcome().bases
        return [None if basis is None else link.stage(basis) for basis in bases]

    def on_device(self, flight: Flight[Refreshed], device: torch.device) -> list[Tensor | None]:
        """The new bases of every mode, for use by the device's next work."""
        outcome = flight.job.outcome()
        if outcome.pending is not None:
            outcome.join()
            return [None if basis is None else in_memory(basis) for basis in outcome.bases]
        link = self.link(device)
        fresh = self._staged.pop(flight, None)
        if fresh is None:
            fresh = self._stage(flight, link)
        link.arrived([basis for basis in fresh if basis is not None])
        return fresh

    def drop(self, flight: Flight[Refreshed]) -> None:
        """The flight will not be installed."""
        self._staged.pop(flight, None)


def _travels(flight: Flight[Refreshed]) -> bool:
    """Whether there is anything to be moved to the device."""
    return flight.job.succeeded and flight.job.outcome().pending is None
