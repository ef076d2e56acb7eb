"""Where the state lives: tiers, budgets, and what is moved when memory runs short."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from asteria.config.runtime import RuntimeConfig, parse_bytes
from asteria.errors import StoreFullError
from asteria.runtime.claims import budgets, items, ledger_steps, working_bytes
from asteria.runtime.extents import Extent
from asteria.runtime.promises import Promises
from asteria.store.buffers import Buffers, device_memory, host_memory, pinned_memory
from asteria.store.cell import Home
from asteria.store.courier import Courier, DeviceCourier, HostCourier
from asteria.store.door import Door
from asteria.store.lane import DeviceLane, Lane
from asteria.store.nvme import NvmeTier
from asteria.store.pressure import (
    device_free_bytes,
    host_free_bytes,
    reserve_bytes,
    shares_host_memory,
)
from asteria.store.residency import WINDOWS, Budgets, Item, place, rewritten_bytes
from asteria.store.tier import Tier
from asteria.store.unified import shared_way
from asteria.telemetry.counters import Traffic

__all__ = ["Residence", "open_nvme"]


def open_nvme(path: str | os.PathLike[str], budget_bytes: int | None) -> Tier:
    """The NVMe tier of a run in the folder ``path``."""
    return NvmeTier(path, budget_bytes=budget_bytes)


class Residence:
    """The tiers of one optimizer, and a door to them for each device. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        refreshes: int = 1,
        lane: Callable[[torch.device], Lane] = DeviceLane,
        is_host: Callable[[torch.device], bool] = shares_host_memory,
        nvme: Callable[[str | os.PathLike[str], int | None], Tier] = open_nvme,
    ) -> None:
        """``refreshes`` run at a time. Raises StoreError where ``nvme_path`` cannot be used.

        The other arguments are the parts that tests put in.
        """
        self._config = config
        self._refreshes = refreshes
        self._lane = lane
        self._is_host = is_host
        self._doors: dict[torch.device, Door] = {}
        self._near: dict[torch.device, Buffers] = {}
        self._host = Buffers(host_memory)
        self._pinned = Buffers(pinned_memory)
        self._nvme: Tier | None = None
        self._nvme_peak_bytes = 0
        self._working_bytes = 0
        self.lock = threading.RLock()  # of all doors: one thread at a time uses the state
        self.sharers = 1
        """Processes that share this machine's memory and disk, each with as much state."""
        self.gathered_bytes = 0  # of a step, for whole gradients and updates of sharded parameters
        self.traffic = Traffic()
        self.promises = Promises()
        if config.nvme_path is not None:
            budget = config.nvme_budget
            self._nvme = nvme(config.nvme_path, None if budget is None else parse_bytes(budget))

    def door(self, device: torch.device) -> Door:
        """To the memory that ``device`` computes in."""
        door = self._doors.get(device)
        if door is None:
            courier: Courier
            if device.type == "cpu" and self._is_host(device):
                near, courier = self._host, HostCourier(self._tier, self.traffic)
            elif self._is_host(device):
                near, courier = shared_way(device, self._lane, self._nvme, self.traffic)
            else:
                near = Buffers(device_memory(device))
                courier = DeviceCourier(self._lane(device), self._pinned, self._tier, self.traffic)
            door = Door(near, courier, self.traffic, lock=self.lock)
            self._near[device], self._doors[device] = near, door
        return door

    def _tier(self) -> Tier:
        if self._nvme is None:
            raise StoreFullError(
                "state was to be moved to NVMe and there is no such tier: give "
                "RuntimeConfig.nvme_path"
            )
        return self._nvme

    def house(self, extents: Sequence[Extent]) -> None:
        """Give the cells of all extents that there are a home within the budgets; move them there.

        Raises StoreFullError, and moves nothing, where the state has no room.
        """
        places = self._places(extents)
        moves = [
            (extent.door, item, cell, home)
            for extent in extents
            for (item, home), cell in zip(places[extent], extent.cells.values(), strict=True)
            if home is not cell.home
        ]
        # Before anything has moved, so that a disk that is too full is known at once.
        self._reserve([item for _, item, _, home in moves if home is Home.NVME])
        # What makes room comes first.
        for door, _, cell, home in sorted(moves, key=lambda move: move[3] < move[2].home):
            door.move(cell, home)
        self._tell(extents)

    def check(self, extents: Sequence[Extent]) -> None:
        """Raise StoreFullError if these, if they were all, had no room; changes nothing."""
        self._places(extents)

    def _places(self, extents: Sequence[Extent]) -> dict[Extent, list[tuple[Item, Home]]]:
        """What each cell asks for and the home it gets; devices share host memory and disk."""
        self._working_bytes = working_bytes(
            ((extent.key, extent.blocks) for extent in extents), refreshes=self._refreshes
        )
        places: dict[Extent, list[tuple[Item, Home]]] = {}
        host_bytes = pinned_bytes = nvme_bytes = 0
        for device in self._doors:
            mine = [extent for extent in extents if extent.device == device]
            limits = self._budgets(device, host_bytes, nvme_bytes)
            groups = [self._items(extent) for extent in mine]
            placement = place(groups, limits)
            for extent, group, homes in zip(mine, groups, placement.homes, strict=True):
                places[extent] = list(zip(group, homes, strict=True))
            near, pinned, nvme = placement.bytes_at
            beside = limits.working_bytes + placement.flying_bytes
            self._near[device].budget_bytes = _less(limits.device_bytes, beside)
            if self._is_host(device):
                host_bytes += near + placement.window_bytes + limits.working_bytes
            elif limits.pinned_bytes is not None:
                self._pinned.budget_bytes = pinned_bytes + limits.pinned_bytes
                host_bytes += pinned
                pinned_bytes += pinned
            nvme_bytes += nvme
        return places

    def _items(self, extent: Extent) -> list[Item]:
        return items(extent.key, extent.blocks, extent.period, self._config, extent.kept_blocks)

    def _budgets(self, device: torch.device, host_bytes: int = 0, nvme_bytes: int = 0) -> Budgets:
        """What there is for all state on ``device`` and below, less what others got of it."""
        shared, disk = self._is_host(device), self._nvme is not None
        free = None
        if disk or not shared:  # else nothing could move, and an allocation would tell
            used = self._pinned.used_bytes + self._host.used_bytes
            free = max(0, used + (host_free_bytes() - reserve_bytes()) // self.sharers)
        near = None
        if not shared:
            used = self._near[device].used_bytes
            near = max(0, used + device_free_bytes(device) - reserve_bytes(device))
        limits = budgets(
            self._config,
            device_bytes=near,
            host_bytes=free,
            nvme_bytes=None,
            shares_memory=shared,
            # Of all devices; the first one finds room for it.
            working=0 if host_bytes else self._working_bytes,
            gathered=0 if host_bytes else self.gathered_bytes,
        )
        limits = replace(limits, nvme_bytes=_less(limits.nvme_bytes, nvme_bytes))
        if shared:
            return replace(limits, device_bytes=_less(limits.device_bytes, host_bytes))
        return replace(limits, pinned_bytes=_less(limits.pinned_bytes, host_bytes))

    def _reserve(self, arrivals: Sequence[Item]) -> None:
        """Find room on the disk for new cells, and for what is written before the old one goes."""
        if arrivals and self._nvme is not None:
            asked = sum(item.nbytes + item.noted_bytes for item in arrivals)
            self._nvme.reserve(asked + rewritten_bytes([arrivals]))

    def _tell(self, extents: Sequence[Extent]) -> None:
        """Let the extents know that homes may have changed."""
        for extent in extents:
            extent.moved_in()
            extent.keep_ledger(wanted=ledger_steps(extent.key, extent.period) > 0)

    def relieve(self, extents: Sequence[Extent]) -> bool:
        """Move state one tier down where free memory is below the reserve; whether any was.

        Raises StoreFullError where it cannot be moved: it is still where it was.
        """
        moved = False
        for device in self._doors:
            mine = [extent for extent in extents if extent.device == device]
            if self._is_host(device):
                if self._nvme is not None:
                    short = reserve_bytes() - host_free_bytes()
                    moved |= self._demote(device, mine, Home.DEVICE, Home.NVME, short)
                continue
            short = reserve_bytes(device) - device_free_bytes(device)
            moved |= self._demote(device, mine, Home.DEVICE, Home.PINNED, short)
            if self._nvme is not None:
                short = reserve_bytes() - host_free_bytes()
                moved |= self._demote(device, mine, Home.PINNED, Home.NVME, short)
        if moved:
            self._tell(extents)
        return moved

    def _demote(
        self, device: torch.device, extents: Sequence[Extent], home: Home, to: Home, short: int
    ) -> bool:
        """Move at least ``short`` bytes, those first that cost a step the least."""
        door, near, traffic = self._doors[device], self._near[device], self.traffic
        if short <= 0:
            return False
        claims = sorted(
            (
                (item.moved_bytes / max(1, item.nbytes), cell)
                for extent in extents
                for item, cell in zip(self._items(extent), extent.cells.values(), strict=True)
                if cell.home is home and cell.nbytes
            ),
            key=lambda claim: claim[0],
        )
        window = WINDOWS * max(
            (sum(c.nbytes for c in e.cells.values()) for e in extents), default=0
        )
        staying = sum(cell.nbytes for _, cell in claims)
        # What is gone flows through from now on, which takes memory too.
        leaving = short + max(0, staying + window - near.used_bytes)
        failed, moved = traffic.failed_writes, 0
        for _, cell in claims:
            if moved >= leaving:
                break
            door.move(cell, to)
            moved += cell.nbytes
        door.flush()
        if traffic.failed_writes > failed:
            for _, cell in claims:
                if cell.home is to and cell.dirty:
                    if home is Home.DEVICE:
                        door.stay(cell)
                    cell.home = home  # pinned memory is reached by another try
            self._tell(extents)
            raise StoreFullError(
                f"free memory is {short} bytes below the reserve, and state could not be moved "
                f"from {home.name.lower()} to {to.name.lower()}: {door.failure}. Free memory, or "
                "lower RuntimeConfig.host_budget and raise nvme_budget; weights and state are as "
                "they were"
            ) from door.failure
        traffic.demoted_bytes += moved
        near.trim()
        if moved and near.budget_bytes is not None:
            # Memory that is given up stays so, but for what has to flow through.
            near.budget_bytes = min(near.budget_bytes, near.used_bytes + window)
        return moved > 0

    @property
    def bytes_at(self) -> dict[str, int]:
        """What is taken on each tier just now."""
        for door in self._doors.values():
            door.tidy()
        near = sum(buffers.used_bytes for buffers in self._near.values())
        nvme = 0 if self._nvme is None else self._nvme.used_bytes
        self._nvme_peak_bytes = max(self._nvme_peak_bytes, nvme)
        return {"device": near, "pinned": self._pinned.used_bytes, "nvme": nvme}

    @property
    def peak_bytes_at(self) -> dict[str, int]:
        """The most that was taken; of NVMe, where it was looked at."""
        near = sum(buffers.peak_bytes for buffers in self._near.values())
        nvme = max(self.bytes_at["nvme"], self._nvme_peak_bytes)
        return {"device": near, "pinned": self._pinned.peak_bytes, "nvme": nvme}

    def close(self) -> None:
        """Drop what lies on NVMe."""
        if self._nvme is not None:
            self._nvme.close()

    def abandon(self) -> None:
        """Close without waiting: for finalizers, which run in any thread, in the tier's own too."""
        if self._nvme is not None:
            # Python is at its end and starts no thread any more: then the folder goes by itself.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._nvme.close, name="asteria close").start()


def _less(limit: int | None, nbytes: int) -> int | None:
    return None if limit is None else max(0, limit - nbytes)
