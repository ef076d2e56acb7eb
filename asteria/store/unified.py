"""For an accelerator that computes in the host's memory (GB10 and the like): nothing is copied.

A window is host memory that the device can address. The disk reads into it and writes from it, once
the device has come to where it was used last.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asteria.store.buffers import Buffers, device_memory, pinned_memory
from asteria.store.cell import Cell
from asteria.store.courier import Courier, HostCourier, OpenTier
from asteria.store.lane import Lane
from asteria.store.tier import Lease, Tier
from asteria.telemetry.counters import Traffic

__all__ = ["UnifiedCourier", "host_face", "shared_way", "unified_memory"]


class UnifiedCourier(HostCourier):
    """The same way, to NVMe and back, in the order of the device's work."""

    def __init__(
        self,
        lane: Callable[[], Lane],
        tier: OpenTier,
        traffic: Traffic,
        face: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``face`` gives the host's view of memory near the device, by default `host_face`."""
        super().__init__(tier, traffic)
        self._make_lane = lane
        self._lane: Lane | None = None
        self._face = face or host_face

    def fetch(self, cell: Cell) -> None:
        """See `Courier`. The device may still use the memory for what was there before."""
        if cell.lease is None or cell.near is None:
            raise RuntimeError("a cell was fetched that has no home or no memory")
        cell.moving = self._here().mark()

    def proceed(self, cell: Cell) -> None:
        """See `Courier`. Begins to read as soon as the device has come that far."""
        if cell.moving is not None and cell.moving.query():
            self._read(cell)

    def _read(self, cell: Cell) -> None:
        lease, near = cell.lease, cell.near
        cell.moving = None
        if lease is None or near is None:
            raise RuntimeError("a cell was read that has no home or no memory")
        cell.reading = lease.tier.get(lease.slot, self._face(near))
        self._traffic.read_bytes += cell.nbytes

    def arrive(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.moving is not None:
            cell.moving.synchronize()
            self._read(cell)
        super().arrive(cell)

    def send(self, cell: Cell) -> None:
        """See `Courier`. What the device computes next may not change the memory."""
        if cell.near is None:
            raise RuntimeError("a cell was sent that has no memory")
        cell.moving = self._here().mark()

    def sent(self, cell: Cell, *, wait: bool) -> bool:
        """See `Courier`."""
        if cell.moving is not None:
            if wait:
                cell.moving.synchronize()
            elif not cell.moving.query():
                return False
            cell.moving = None
            tier, near = self._tier(), cell.near
            if near is None:
                raise RuntimeError("a cell was written that has no memory")
            cell.writing = Lease(tier, tier.put(self._face(near)))
            self._traffic.written_bytes += cell.nbytes
        return super().sent(cell, wait=wait)

    def _here(self) -> Lane:
        if self._lane is None:
            self._lane = self._make_lane()
        return self._lane


class _Addressed:
    """Memory that CUDA can address, as it is told to other libraries."""

    def __init__(self, host: Tensor) -> None:
        self._host = host  # which ends with this object
        self.__cuda_array_interface__ = {
            "data": (host.data_ptr(), False),
            "shape": (host.numel(),),
            "typestr": "|u1",
            "version": 3,
        }


def shared_way(
    device: torch.device,
    lane: Callable[[torch.device], Lane],
    tier: Tier | None,
    traffic: Traffic,
) -> tuple[Buffers, Courier]:
    """Memory and a courier for an accelerator that shares the host's memory.

    Without a ``tier`` nothing ever leaves, and the memory is the accelerator's own.
    """
    allocate = device_memory(device) if tier is None else unified_memory(device)

    def opened() -> Tier:
        if tier is None:
            raise RuntimeError("state was to be moved where there is nothing to move it to")
        return tier

    return Buffers(allocate), UnifiedCourier(lambda: lane(device), opened, traffic)


def unified_memory(device: torch.device) -> Callable[[int], Tensor]:
    """Where to get memory from that host and device share, as (nbytes,) uint8 on ``device``."""

    def allocate(nbytes: int) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=device)
        made: Any = _Addressed(pinned_memory(nbytes))
        # The system takes the memory back at once, whatever the device has still to do with it.
        weakref.finalize(made, torch.accelerator.synchronize, device).atexit = False
        return torch.as_tensor(made, device=device)

    return allocate


def host_face(near: Tensor) -> Tensor:
    """The host's view of memory that `unified_memory` gave; it does not keep the memory alive.

    Where host and device share memory, an address means the same to both.
    """
    if near.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    memory = (ctypes.c_ubyte * near.numel()).from_address(near.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8)
