"""Copies between a device and the host that the training thread never waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DeviceLink", "HostLink", "Link", "Snapshot", "link_to"]


class Snapshot(Protocol):
    """A tensor as it was when the snapshot was taken."""

    def on_host(self) -> Tensor:
        """The values in host memory; waits for the copy. For a worker thread."""


class Link(Protocol):
    """The way of bases and factors between the device of a parameter and the workers."""

    travels: bool
    """Whether a result has to be moved to the device before it can be installed."""

    def snapshot(self, tensor: Tensor, *, copy: bool) -> Snapshot:
        """Keep the values of now; without ``copy`` nobody is going to change them.

        For the training thread; no waiting.
        """

    def outgoing(self, tensor: Tensor) -> Tensor:
        """A result in memory that a transfer can start from. For a worker thread."""

    def stage(self, tensor: Tensor) -> Tensor:
        """Start the transfer of a result to the device. For the training thread; no waiting."""

    def arrived(self, staged: Iterable[Tensor]) -> None:
        """Let the device's next work, which uses ``staged``, come after all transfers.

        No waiting on the host.
        """


class _HostSnapshot:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def on_host(self) -> Tensor:
        return self._tensor


class HostLink:
    """For parameters in host memory: nothing has to travel."""

    travels = False

    def snapshot(self, tensor: Tensor, *, copy: bool) -> Snapshot:
        """See `Link`."""
        return _HostSnapshot(tensor.clone() if copy else tensor)

    def outgoing(self, tensor: Tensor) -> Tensor:
        """See `Link`."""
        return tensor

    def stage(self, tensor: Tensor) -> Tensor:
        """See `Link`."""
        return tensor

    def arrived(self, staged: Iterable[Tensor]) -> None:
        """See `Link`."""


class _DeviceSnapshot:
    def __init__(self, host: Tensor, arrived: torch.Event) -> None:
        self._host = host
        self._arrived = arrived

    def on_host(self) -> Tensor:
        self._arrived.synchronize()
        return self._host


class DeviceLink:
    """For parameters on an accelerator: copies on a side stream, from and to pinned memory."""

    travels = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def snapshot(self, tensor: Tensor, *, copy: bool) -> Snapshot:
        """See `Link`. The device keeps a copy until it has travelled, so ``copy`` is no choice."""
        kept = tensor.clone()
        # In the memory order of the device, so that the transfer is one piece.
        host = torch.empty_like(kept, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with _current(self._stream):
            host.copy_(kept, non_blocking=True)
            arrived = torch.Event(self._device, blocking=True)  # a spinning worker takes a core
            arrived.record(self._stream)
        kept.record_stream(self._stream)
        return _DeviceSnapshot(host, arrived)

    def outgoing(self, tensor: Tensor) -> Tensor:
        """See `Link`."""
        # Else pinning would occupy the first device, which may be another rank's.
        torch.get_device_module(self._device).set_device(self._device)
        pinned = torch.empty_like(tensor, pin_memory=True)
        return pinned.copy_(tensor)

    def stage(self, tensor: Tensor) -> Tensor:
        """See `Link`. The result belongs to the side stream until `arrived`."""
        with _current(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def arrived(self, staged: Iterable[Tensor]) -> None:
        """See `Link`."""
        stream = torch.accelerator.current_stream(self._device)
        stream.wait_stream(self._stream)
        for tensor in staged:
            tensor.record_stream(stream)


@contextlib.contextmanager
def _current(stream: torch.Stream) -> Iterator[None]:
    """Issue work on ``stream``; a Stream is no context manager before torch 2.7."""
    device = torch.accelerator.current_device_index()
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)  # which also makes its device the current one
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)


def link_to(device: torch.device) -> Link:
    """The link for parameters on ``device``."""
    return HostLink() if device.type == "cpu" else DeviceLink(device)
