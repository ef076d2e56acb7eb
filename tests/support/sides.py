"""A stand-in for a stream beside the training that makes a wrong order visible."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import RuntimeConfig
from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.method import refreshed
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import device_refresh
from asteria.runtime.device_refresh import DeviceRefresher
from tests.support.arms import PERIOD
from tests.support.asynchronous import SHAPES, build, manual
from tests.support.training import Shape

ALIKE: list[Shape] = [(6, 4)] * 5 + [(4, 4)] * 3
"""Two kinds of blocks, several of each."""
ONE: list[Shape] = [(4, 4)]


class MisuseError(AssertionError):
    """Something was read too late or used too early."""


class DeferredWork:
    """Work that is done when somebody waits for it; until then its results are spoilt.

    What it reads must stay as it was. The host learns of its end by ``synchronize``, or if it asks
    often enough once the device has come to it.
    """

    def __init__(self, side: "DeferredSide", work: Callable[[], list[Tensor]], reads: list[Tensor]):
        self._side = side
        self._work = work
        self._reads = [(tensor, tensor.clone()) for tensor in reads]
        self.results = work()  # for their shapes
        for result in self.results:
            result.fill_(torch.nan if result.is_floating_point() else False)
        self.done = False
        self._polls = 2

    def do(self, *, is_wanted: bool = True) -> None:
        if not self.done:
            for tensor, kept in self._reads:
                if is_wanted and not torch.equal(tensor, kept):
                    raise MisuseError("what was read has changed before the work was done")
            for result, value in zip(self.results, self._work(), strict=True):
                result.copy_(value)
            self.done = True

    def query(self) -> bool:
        self._side.queries += 1
        self._polls -= self.done
        return self._polls < 0

    def synchronize(self) -> None:
        self._side.waits += 1
        self._side.finish(self)
        self._polls = -1

    def wait(self, stream: Any = None) -> None:
        self._side.finish(self)

    def seconds(self) -> float:
        if not self.done:
            raise MisuseError("the duration of work was asked for before its end")
        return 0.5


class DeferredSide:
    """Does all work as late as possible, in order."""

    def __init__(self) -> None:
        self.runs = self.joins = self.queries = self.waits = 0
        self._begun: list[DeferredWork] = []

    def run(
        self, work: Callable[[], list[Tensor]], reads: Iterable[Tensor]
    ) -> tuple[list[Tensor], DeferredWork]:
        begun = DeferredWork(self, work, list(reads))
        self.runs += 1
        self._begun.append(begun)
        return begun.results, begun

    def join(self, passed: Any, results: Iterable[Tensor]) -> None:
        self.joins += 1
        passed.wait()

    def finish(self, work: DeferredWork) -> None:
        """A stream does its work in order."""
        if work in self._begun:
            place = self._begun.index(work)
            for earlier in self._begun[:place]:
                # What nobody has joined may have been dropped, with all that it reads.
                earlier.do(is_wanted=False)
            work.do()
            del self._begun[: place + 1]


class BrokenSide(DeferredSide):
    """Has no memory left, as long as it is told so."""

    full = False

    def run(self, work: Any, reads: Any) -> Any:
        if self.full:
            raise torch.OutOfMemoryError("the device is full")
        return super().run(work, reads)


def beside(optimizer: SecondOrderOptimizer, side: DeferredSide) -> SecondOrderOptimizer:
    """Let a new optimizer refresh on this side."""
    background = optimizer._engine._background
    assert background is not None
    background.launcher._devices = DeviceRefresher(lambda device: side)
    return optimizer


def on_device(
    name: str,
    side: DeferredSide,
    shapes: list[Shape] = SHAPES,
    period: int = PERIOD,
    **runtime: Any,
) -> SecondOrderOptimizer:
    """One that refreshes on ``side``."""
    config = RuntimeConfig(refresh_on="device", **runtime)
    return beside(build(name, config, shapes, precondition_frequency=period), side)


def on_host(
    name: str, shapes: list[Shape] = SHAPES, period: int = PERIOD, **runtime: Any
) -> SecondOrderOptimizer:
    """The same by workers."""
    config = RuntimeConfig(**runtime)
    return manual(build(name, config, shapes, precondition_frequency=period))[0]


class Spoiler:
    """Stands where a device computes bases, and makes some of them unusable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any = device_refresh) -> None:
        self.spoils: Callable[[Tensor], Tensor] | None = None
        """(b, n, n) factors -> (b,) bool."""
        monkeypatch.setattr(where, "refreshed", self)

    def __call__(self, factor: Tensor, basis: Tensor, **how: Any) -> BasisResult:
        fresh, usable = refreshed(factor, basis, **how)
        if self.spoils is None:
            return BasisResult(fresh, usable)
        bad = self.spoils(factor)
        return BasisResult(torch.where(bad[:, None, None], torch.nan, fresh), usable & ~bad)
