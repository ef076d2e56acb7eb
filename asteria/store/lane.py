"""The way between host memory and an accelerator, on streams of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DeviceLane", "Lane", "Marker", "current_stream", "stream_of"]


class Marker(Protocol):
    """A point in a stream of work."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Wait on the host until it has."""

    def wait(self, stream: Any = None) -> None:
        """Let a stream, by default the current one, wait on the device."""


class Lane(Protocol):
    """Copies that the training thread starts and does not wait for. For that thread."""

    def upload(self, host: Tensor, target: Tensor) -> Marker:
        """Copy to the device, once it has computed what it was asked to so far.

        ``host`` must not change until done, and the device may use ``target`` only after `use`.
        """

    def use(self, arrived: Marker) -> None:
        """Let what the device computes next come after an upload."""

    def download(self, source: Tensor, host: Tensor) -> Marker:
        """Copy to the host what the device has computed so far; neither may change until done."""

    def mark(self) -> Marker:
        """What the device has been asked to compute so far."""

    def give_way(self, leaving: Marker) -> None:
        """Let what the device computes and uploads next come after a download.

        So it may change the download's source, and upload what it has brought.
        """


class DeviceLane:
    """One stream in each direction, so that reads and writes share the link's two directions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up = torch.Stream(device)
        self._down = torch.Stream(device)

    def upload(self, host: Tensor, target: Tensor) -> Marker:
        """See `Lane`."""
        self._up.wait_stream(torch.accelerator.current_stream(self._device))
        with current_stream(self._up):
            target.copy_(host, non_blocking=True)
        return self._up.record_event()

    def use(self, arrived: Marker) -> None:
        """See `Lane`."""
        arrived.wait(torch.accelerator.current_stream(self._device))

    def download(self, source: Tensor, host: Tensor) -> Marker:
        """See `Lane`."""
        self._down.wait_stream(torch.accelerator.current_stream(self._device))
        with current_stream(self._down):
            host.copy_(source, non_blocking=True)
        return self._down.record_event()

    def mark(self) -> Marker:
        """See `Lane`."""
        return torch.accelerator.current_stream(self._device).record_event()

    def give_way(self, leaving: Marker) -> None:
        """See `Lane`."""
        leaving.wait(self._up)
        leaving.wait(torch.accelerator.current_stream(self._device))


def stream_of(device: torch.device) -> torch.Stream | None:
    """Where the calling thread's work on ``device`` goes; None for the host."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


@contextlib.contextmanager
def current_stream(stream: torch.Stream | None) -> Iterator[None]:
    """Issue work on ``stream``, if any; a Stream is no context manager before torch 2.7."""
    if stream is None:
        yield
        return
    device = torch.accelerator.current_device_index()
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)  # which also makes its device the current one
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)
