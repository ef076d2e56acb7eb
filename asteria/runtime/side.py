"""Work beside the training on the device of the parameters, which the host does not wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from asteria.store.lane import Marker, current_stream

__all__ = ["Passed", "Side", "SideStream", "side_of"]


class Passed(Marker, Protocol):
    """The end of some work beside the training."""

    def seconds(self) -> float:
        """What the work took on the device; once the end is passed."""


class Side(Protocol):
    """Where work beside the training is done, in order. For the training thread."""

    def run(
        self, work: Callable[[], list[Tensor]], reads: Iterable[Tensor]
    ) -> tuple[list[Tensor], Passed]:
        """Begin ``work`` once the device has computed what it was asked to so far; never waits.

        ``work`` reads the tensors of ``reads``, which the caller may drop afterwards but must not
        change, and returns new ones, which nobody may use before `join`.
        """

    def join(self, passed: Passed, results: Iterable[Tensor]) -> None:
        """Let what the device computes next, with ``results``, come after that work.

        No waiting on the host.
        """


class SideStream:
    """A stream of its own. Its priority is the lowest that CUDA has, which training has, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def run(
        self, work: Callable[[], list[Tensor]], reads: Iterable[Tensor]
    ) -> tuple[list[Tensor], Passed]:
        """See `Side`."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        try:
            with current_stream(self._stream):
                begun = self._event()
                results = work()
                ended = self._event()
        finally:
            # Or their memory would be the training's again while this stream still reads it.
            for tensor in reads:
                tensor.record_stream(self._stream)
        return results, _Interval(begun, ended)

    def join(self, passed: Passed, results: Iterable[Tensor]) -> None:
        """See `Side`."""
        stream = torch.accelerator.current_stream(self._device)
        passed.wait(stream)
        for tensor in results:
            if tensor.device == self._device:
                tensor.record_stream(stream)

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record(self._stream)
        return event


class _Interval:
    """Two events around some work."""

    def __init__(self, begun: torch.Event, ended: torch.Event) -> None:
        self._begun = begun
        self._ended = ended

    def query(self) -> bool:
        return self._ended.query()

    def synchronize(self) -> None:
        self._ended.synchronize()

    def wait(self, stream: Any = None) -> None:
        self._ended.wait(stream)

    def seconds(self) -> float:
        return self._begun.elapsed_time(self._ended) * 1e-3


class _HostSide:
    """For parameters in host memory, where nothing is beside the training: at once."""

    def run(
        self, work: Callable[[], list[Tensor]], reads: Iterable[Tensor]
    ) -> tuple[list[Tensor], Passed]:
        """See `Side`."""
        begin_s = time.perf_counter()
        results = work()
        return results, _Done(time.perf_counter() - begin_s)

    def join(self, passed: Passed, results: Iterable[Tensor]) -> None:
        """See `Side`."""


class _Done:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def seconds(self) -> float:
        return self._seconds


def side_of(device: torch.device) -> Side:
    """Where work beside the training on ``device`` is done."""
    return _HostSide() if device.type == "cpu" else SideStream(device)
