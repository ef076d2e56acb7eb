"""Stand-ins for disks and links that make a wrong order visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from asteria.config.runtime import RuntimeConfig
from asteria.errors import StoreCorruptError, StoreError, StoreFullError
from asteria.runtime import extents
from asteria.runtime.engine import Engine
from asteria.runtime.residence import Residence
from asteria.store.cell import Cell, Home
from tests.support.execution import ManualExecutor
from tests.support.links import CheckedLink

_SPOILED = 0xFF
"""Every float made of such bytes is nan."""


class MisuseError(AssertionError):
    """Memory was read or written while a copy of it was under way."""


class CheckedCopy:
    """A copy that takes place when somebody waits for it, or asks often enough.

    Until then the target holds nan. The source must stay as it was.
    """

    def __init__(self, source: Tensor, target: Tensor, *, polls: int = 2) -> None:
        self._source = source
        self._kept = source.clone()
        self._target = target
        target.fill_(_SPOILED)
        self._polls = polls
        self._copied = False

    @property
    def done(self) -> bool:
        self._polls -= 1
        if self._polls <= 0:
            self.wait()
        return self._copied

    def query(self) -> bool:
        return self.done

    def wait(self, stream: Any = None) -> None:
        if not self._copied:
            if not torch.equal(self._source, self._kept):
                raise MisuseError("the source has changed while it was copied")
            self._target.copy_(self._kept)
            self._copied = True

    synchronize = wait


class CheckedSlot(CheckedCopy):
    def __init__(self, source: Tensor) -> None:
        self.nbytes = source.numel()
        self.data = torch.empty_like(source)
        super().__init__(source, self.data)

    def wait(self, stream: Any = None) -> None:
        super().wait(stream)
        self._source = self._kept  # who wrote it may free it


class CheckedTier:
    """An NVMe tier in memory, for one thread or for workers that wait at once."""

    name = "nvme"

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.slots: list[CheckedSlot] = []
        self.puts = self.gets = self.most_bytes = 0

    @property
    def used_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def reserve(self, nbytes: int) -> None:
        room = None if self.budget_bytes is None else self.budget_bytes - self.used_bytes
        if room is not None and nbytes > room:
            raise StoreFullError(f"{nbytes} bytes were to be reserved where {room} are free")

    def put(self, source: Tensor) -> CheckedSlot:
        room = None if self.budget_bytes is None else self.budget_bytes - self.used_bytes
        if room is not None and source.numel() > room:
            raise StoreFullError(f"{source.numel()} bytes were to be put where {room} are free")
        slot = CheckedSlot(source)
        self.slots.append(slot)
        self.puts += 1
        self.most_bytes = max(self.most_bytes, self.used_bytes)
        return slot

    def get(self, slot: Any, target: Tensor) -> CheckedCopy:
        slot.wait()
        self.gets += 1
        return CheckedCopy(slot.data, target)

    def drop(self, slot: Any) -> None:
        if slot in self.slots:
            slot.wait()
            self.slots.remove(slot)

    give_up = drop

    def close(self) -> None:
        self.slots.clear()


class CheckedUpload(CheckedCopy):
    """One that the device waits for with `wait`, and the host with `synchronize` or `query`.

    Until the host knows that it has ended, its source must stay as it was.
    """

    def check(self) -> None:
        if not torch.equal(self._source, self._kept):
            raise MisuseError("the source has changed while it was copied")

    def synchronize(self) -> None:  # type: ignore[override]
        self.check()
        self.wait()
        self.ended = True

    ended = False
    queries = 0

    def query(self) -> bool:
        self.queries += 1
        if self.queries > 2:
            self.synchronize()
        return self.ended


class CheckedDownload(CheckedCopy):
    """One that the device may know to have ended, and the host not.

    Then the host finds nothing yet, but the source may change, and the device brings back what was
    there.
    """

    waits = 0
    """Of the host."""

    def give_way(self) -> None:
        if not torch.equal(self._source, self._kept):
            raise MisuseError("the source has changed while it was copied")
        self._source = self._kept

    def synchronize(self) -> None:  # type: ignore[override]
        self.waits += not self._copied
        self.wait()


class CheckedMark:
    """A point that the device has come to when somebody waits for it, or asks twice."""

    def __init__(self) -> None:
        self.passed = False
        self._polls = 2

    def query(self) -> bool:
        self._polls -= 1
        self.passed |= self._polls <= 0
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def wait(self, stream: Any = None) -> None:
        raise MisuseError("the device was to wait for itself")


class CheckedLane:
    """A link to a device that computes at once; copies end when they are waited for."""

    def __init__(self) -> None:
        self.uploads = self.downloads = self.ways = 0
        self._down: dict[int, CheckedDownload] = {}
        """The latest to each piece of host memory, unless it has ended."""
        self._up: dict[int, CheckedUpload] = {}
        """The latest from each piece of host memory, unless its end is known."""

    def upload(self, host: Tensor, target: Tensor) -> CheckedUpload:
        self._settle(host)
        if (before := self._down.pop(host.data_ptr(), None)) is not None:
            before.wait()
        self._up = {place: up for place, up in self._up.items() if not up.ended}
        self.uploads += 1
        started = self._up[host.data_ptr()] = CheckedUpload(host, target)
        return started

    def use(self, arrived: Any) -> None:
        arrived.wait()

    def download(self, source: Tensor, host: Tensor) -> CheckedCopy:
        self._settle(host)
        self.downloads += 1
        self._down = {place: down for place, down in self._down.items() if not down._copied}
        started = self._down[host.data_ptr()] = CheckedDownload(source, host)
        return started

    def mark(self) -> CheckedMark:
        return CheckedMark()

    def give_way(self, leaving: Any) -> None:
        self.ways += 1
        leaving.give_way()

    def check(self) -> None:
        """Whether everybody who wrote to host memory had seen the end of its upload."""
        for upload in self._up.values():
            if not upload.ended:
                upload.check()

    def _settle(self, host: Tensor) -> None:
        """What the device copies from and to the same memory it copies in order."""
        before = self._up.pop(host.data_ptr(), None)
        if before is not None and not before.ended:
            before.check()


def tiered(
    optimizer: Any,
    runtime: RuntimeConfig,
    *,
    tier: CheckedTier | None = None,
    lane: Callable[[torch.device], Any] | None = None,
    executor: Any = None,
) -> Residence:
    """Let an optimizer without state keep it on these tiers; with a ``lane`` the CPU is a device
    whose memory is not the host's.
    """
    parts: dict[str, Any] = {"nvme": lambda path, budget: tier}
    if lane is not None:
        parts |= {"lane": lane, "is_host": lambda device: False}
    residence = Residence(runtime, **parts)
    engine = optimizer._engine = Engine(runtime, executor=executor, residence=residence)
    if lane is not None and engine._background is not None:
        engine._background._stager._links[torch.device("cpu")] = CheckedLink()
    return residence


class Arrangement(NamedTuple):
    """Where state may live; the CPU plays a device of its own where it is ``apart``."""

    budgets: dict[str, int]
    disk: bool = True
    apart: bool = False


FEW_BYTES = 7 * 1024
"""Room for what flows through a step, and for some cells of the small models of tests."""
WORKING_BYTES = 64 * 1024**2 + 6 * 1024
"""Of host memory, beside the state of such a model."""

ARRANGEMENTS = {
    "disk": Arrangement({"host_budget": 0}),
    "some on disk": Arrangement({"host_budget": WORKING_BYTES + FEW_BYTES}),
    "pinned": Arrangement({"device_budget": 0}, disk=False, apart=True),
    "some pinned": Arrangement({"device_budget": FEW_BYTES}, disk=False, apart=True),
    "pinned and disk": Arrangement({"device_budget": 0, "host_budget": 9728}, apart=True),
    "all three": Arrangement({"device_budget": FEW_BYTES, "host_budget": 7680}, apart=True),
    "disk behind a device": Arrangement({"device_budget": 0, "host_budget": 0}, apart=True),
}


class Stores(NamedTuple):
    """What an optimizer was given by `arranged`."""

    residence: Residence
    tier: CheckedTier
    lane: CheckedLane
    workers: ManualExecutor


def arranged(optimizer: Any, arrangement: Arrangement, tier: CheckedTier | None = None) -> Stores:
    """Keep the state of a new optimizer so, on stand-ins; its workers work when waited for."""
    runtime = replace(optimizer._runtime, **arrangement.budgets, **_somewhere(arrangement))
    optimizer._runtime = runtime
    tier, lane, workers = tier or CheckedTier(), CheckedLane(), ManualExecutor()
    residence = tiered(
        optimizer,
        runtime,
        tier=tier,
        lane=(lambda device: lane) if arrangement.apart else None,
        executor=workers,
    )
    return Stores(residence, tier, lane, workers)


def _somewhere(arrangement: Arrangement) -> dict[str, str]:
    return {"nvme_path": "never made"} if arrangement.disk else {}


def limit_extents(monkeypatch: pytest.MonkeyPatch, extent_bytes: int) -> None:
    """Let an extent be of so many bytes, so that small models have several."""
    monkeypatch.setattr(extents, "EXTENT_BYTES", extent_bytes)


def cells(optimizer: Any) -> list[Cell]:
    """All that an optimizer has."""
    return [cell for extent in optimizer._engine._all() for cell in extent.cells.values()]


def homes(optimizer: Any) -> set[Home]:
    """Where they live."""
    return {cell.home for cell in cells(optimizer)}


class _FailedSlot:
    """What could not be written, as turns out after a while."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._polls = 2

    @property
    def done(self) -> bool:
        self._polls -= 1
        return self._polls <= 0

    def wait(self) -> None:
        raise StoreError("the disk did not write")


class _FailedRead:
    """A read that has left half of something in its target."""

    done = True

    def __init__(self, target: Tensor) -> None:
        target.fill_(_SPOILED)

    def wait(self) -> None:
        raise StoreCorruptError("the disk gave back something else")


class FaultyTier(CheckedTier):
    """A disk that fails once or more often, in one way."""

    def __init__(self, fault: str, first: int, times: int = 1) -> None:
        """``fault`` is "full", "write" or "read"; ``first`` counts such operations from 0."""
        super().__init__()
        self.fault = fault
        self.failing = range(first, first + times)
        self.failed = 0

    def _fails(self, fault: str, count: int) -> bool:
        fails = fault == self.fault and count in self.failing
        self.failed += fails
        return fails

    def put(self, source: Tensor) -> Any:
        if self._fails("full", self.puts):
            self.puts += 1
            raise StoreFullError(f"{source.numel()} bytes were to be put on a full disk")
        if self._fails("write", self.puts):
            self.puts += 1
            return _FailedSlot(source.numel())
        return super().put(source)

    def get(self, slot: Any, target: Tensor) -> Any:
        slot.wait()
        if self._fails("read", self.gets):
            self.gets += 1
            return _FailedRead(target)
        return super().get(slot, target)

    def drop(self, slot: Any) -> None:
        if not isinstance(slot, _FailedSlot):
            super().drop(slot)

    give_up = drop
