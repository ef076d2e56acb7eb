"""Flags that a device finds out and the host reads later, without ever waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

from asteria.store.lane import Marker

__all__ = ["Report", "to_host"]


def to_host(flags: Tensor) -> Tensor:
    """The flags in host memory, once the device has come to the end of its current stream's work.

    Shapes: any, bool. Never waits; any thread.
    """
    if flags.device.type == "cpu":
        return flags
    host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
    return host.copy_(flags, non_blocking=True)


class Report:
    """Flags on their way from a device to the host. For the training thread."""

    def __init__(self, flags: Tensor, arrived: Marker | None) -> None:
        """``flags`` in host memory, bool of any shape; valid once ``arrived`` is passed."""
        self._flags = flags
        self._arrived = arrived

    @classmethod
    def of(cls, flags: Tensor) -> Report:
        """Send flags that the device's current stream computes."""
        host = to_host(flags)
        if flags.device.type == "cpu":
            return cls(host, None)
        arrived = torch.Event(flags.device)
        arrived.record(torch.accelerator.current_stream(flags.device))
        return cls(host, arrived)

    def part(self, start: int, stop: int) -> Report:
        """Those of ``start`` to ``stop`` along the first dimension."""
        return Report(self._flags[start:stop], self._arrived)

    def read(self, *, wait: bool) -> Tensor | None:
        """The flags; None if they have not arrived and nobody is to ``wait``."""
        if self._arrived is not None:
            if wait:
                self._arrived.synchronize()
            elif not self._arrived.query():
                return None
            self._arrived = None
        return self._flags
