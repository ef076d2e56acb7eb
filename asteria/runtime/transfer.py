"""Copies between a device and the host that the training thread never waits for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from asteria.errors import StoreError
from asteria.store.buffers import host_memory
from asteria.store.lane import current_stream
from asteria.store.tier import Lease, Tier

__all__ = [
    "DeviceLink",
    "HostLink",
    "Link",
    "Result",
    "Snapshot",
    "StoredResult",
    "TierLink",
    "in_memory",
    "link_to",
]


class Snapshot(Protocol):
    """A tensor as it was when the snapshot was taken."""

    def on_host(self) -> Tensor:
        """The values in host memory; waits for the copy. For a worker thread."""


class StoredResult:
    """A result that waits on NVMe until it is installed."""

    def __init__(self, tensor: Tensor, tier: Tier) -> None:
        """``tensor`` (b, n, n), column after column in memory; waits until it is written.

        Raises StoreError if it cannot be.
        """
        self.shape, self._dtype = tensor.shape, tensor.dtype
        source = tensor.mT.contiguous().view(torch.uint8).view(-1)
        self._lease = Lease(tier, tier.put(source))
        self._lease.slot.wait()

    def load(self) -> Tensor:
        """The result in memory of its own; raises StoreCorruptError if it is not what it was."""
        memory = host_memory(self._lease.slot.nbytes)
        self._lease.tier.get(self._lease.slot, memory).wait()
        return memory.view(self._dtype).view(self.shape).mT


Result = Tensor | StoredResult


class Link(Protocol):
    """The way of bases and factors between the device of a parameter and the workers."""

    travels: bool
    """Whether a result has to be moved to the device before it can be installed."""

    def snapshot(self, tensor: Tensor, *, copy: bool) -> Snapshot:
        """Keep the values of now; without ``copy`` nobody is going to change them.

        For the training thread; no waiting.
        """

    def outgoing(self, tensor: Tensor) -> Result:
        """A result where a transfer can start from. For a worker thread."""

    def stage(self, result: Result) -> Tensor:
        """Start the transfer of a result to the device. For the training thread.

        Waits for the disk only, if the result is there.
        """

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

    def outgoing(self, tensor: Tensor) -> Result:
        """See `Link`."""
        return tensor

    def stage(self, result: Result) -> Tensor:
        """See `Link`."""
        return in_memory(result)

    def arrived(self, staged: Iterable[Tensor]) -> None:
        """See `Link`."""


class TierLink(HostLink):
    """For parameters in host memory whose bases are on NVMe: results wait there, too."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    def outgoing(self, tensor: Tensor) -> Result:
        """See `Link`. What cannot be written stays in memory."""
        try:
            return StoredResult(tensor, self._tier)
        except StoreError:
            return tensor


class _DeviceSnapshot:
    def __init__(self, host: Tensor, arrived: Any) -> None:
        self._host = host
        self._arrived = arrived

    def on_host(self) -> Tensor:
        self._arrived.synchronize()
        return self._host


class DeviceLink:
    """For parameters on an accelerator: copies on side streams, from and to pinned memory.

    One for each direction: an install must not wait for snapshots that go the other way.
    """

    travels = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up = torch.Stream(device)
        self._down = torch.Stream(device)

    def snapshot(self, tensor: Tensor, *, copy: bool) -> Snapshot:
        """See `Link`. The device keeps a copy until it has travelled, so ``copy`` is no choice."""
        kept = tensor.clone()
        # In the memory order of the device, so that the transfer is one piece.
        host = torch.empty_like(kept, device="cpu", pin_memory=True)
        self._down.wait_stream(torch.accelerator.current_stream(self._device))
        with current_stream(self._down):
            host.copy_(kept, non_blocking=True)
            arrived = _event_to_wait_for(self._device)
        kept.record_stream(self._down)
        return _DeviceSnapshot(host, arrived)

    def outgoing(self, tensor: Tensor) -> Result:
        """See `Link`."""
        # Else pinning would occupy the first device, which may be another rank's.
        torch.get_device_module(self._device).set_device(self._device)
        pinned = torch.empty_like(tensor, pin_memory=True)
        return pinned.copy_(tensor)

    def stage(self, result: Result) -> Tensor:
        """See `Link`. The result belongs to the side stream until `arrived`."""
        with current_stream(self._up):
            return in_memory(result).to(self._device, non_blocking=True)

    def arrived(self, staged: Iterable[Tensor]) -> None:
        """See `Link`."""
        stream = torch.accelerator.current_stream(self._device)
        stream.wait_stream(self._up)
        for tensor in staged:
            tensor.record_stream(stream)


def _event_to_wait_for(device: torch.device) -> Any:
    """The end of what the current stream of ``device``, the current device, is asked to so far.

    A worker that waits for it sleeps: to spin would take a core. (``torch.Event`` takes
    ``blocking``, and does nothing with it.)
    """
    if device.type == "cuda":
        event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    else:
        event = torch.Event(device)
    event.record()
    return event


def in_memory(result: Result) -> Tensor:
    """A result in host memory, wherever it has waited."""
    return result.load() if isinstance(result, StoredResult) else result


def link_to(device: torch.device) -> Link:
    """The link for parameters on ``device``."""
    return HostLink() if device.type == "cpu" else DeviceLink(device)
