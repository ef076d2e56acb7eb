"""What `asteria probe` measures of this machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import eigh_basis, orthogonal_iteration
from asteria.planner.disk_speed import measure_disk
from asteria.planner.machine import local_machine
from asteria.refresh.costs import Timings
from asteria.refresh.pool import jobs_and_threads
from asteria.refresh.threads import limit_math_threads

__all__ = ["Measurement", "Probe"]

Measurement: TypeAlias = Callable[[], dict[str, Any]]
"""Takes some seconds and returns fields of a `Machine`."""

_TIMES = 3
"""Of each measurement; the median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What is measured, and how large it is. All of it takes less than half a minute."""

    folder: Path
    """On the disk that is measured."""
    file_bytes: int = 256 * 1024**2
    copy_bytes: int = 128 * 1024**2
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    """Of factors, by increasing size."""
    exact_sizes: tuple[int, ...] = (256, 512, 1024)
    most_s: float = 5.0
    """No further size is measured that would take longer than this."""
    clock: Callable[[], float] = time.perf_counter

    def measurements(self) -> Iterator[tuple[str, Measurement]]:
        """(what is measured, how) in order; later ones replace fields of earlier ones."""
        yield "memory", self._memory
        if hasattr(os, "pwrite"):  # not on Windows, where the rates stay the default ones
            yield "disk", self._disk
        yield "copies", self._copies
        if torch.cuda.is_available():
            yield "link", self._link
        yield "refreshes", self._refreshes
        yield "exact refreshes", self._exact

    def _memory(self) -> dict[str, Any]:
        found = local_machine(self.folder)
        names = ("device_bytes", "host_bytes", "nvme_bytes", "cores", "training_threads")
        threads = jobs_and_threads(found.free_cores)[1]
        return {name: getattr(found, name) for name in names} | {"math_threads": threads}

    def _disk(self) -> dict[str, Any]:
        speed = measure_disk(self.folder, file_bytes=self.file_bytes, clock=self.clock)
        return {
            "disk_read_bytes_per_s": speed.read_bytes_per_s,
            "disk_write_bytes_per_s": speed.write_bytes_per_s,
        }

    def _copies(self) -> dict[str, Any]:
        source = torch.ones(self.copy_bytes, dtype=torch.uint8, device="cpu")
        target = torch.zeros_like(source)
        seconds = self._median(lambda: target.copy_(source))
        return {"host_copy_bytes_per_s": self.copy_bytes / seconds}

    def _link(self) -> dict[str, Any]:
        """The slower way of the two."""
        host = torch.empty(self.copy_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        device = torch.empty_like(host, device="cuda")

        def copy(target: Tensor, source: Tensor) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        copy(device, host)
        up_s = self._median(partial(copy, device, host))
        down_s = self._median(partial(copy, host, device))
        return {"link_bytes_per_s": self.copy_bytes / max(up_s, down_s)}

    def _refreshes(self) -> dict[str, Any]:
        def once(factor: Tensor, basis: Tensor) -> object:
            return orthogonal_iteration(factor, basis, sort=True)

        return {"refresh_s": self._timings(self.sizes, once)}

    def _exact(self) -> dict[str, Any]:
        return {"exact_s": self._timings(self.exact_sizes, lambda factor, _: eigh_basis(factor))}

    def _timings(self, sizes: tuple[int, ...], once: Callable[[Tensor, Tensor], object]) -> Timings:
        """On a thread of its own, with the math threads of one worker."""
        threads = jobs_and_threads(local_machine().free_cores)[1]
        found: list[tuple[int, float]] = []
        with ThreadPoolExecutor(1, initializer=limit_math_threads, initargs=(threads,)) as worker:
            for size in sizes:
                if found and found[-1][1] * (size / found[-1][0]) ** 3 * _TIMES > self.most_s:
                    break
                pair = worker.submit(_factor_and_basis, size).result()
                seconds = worker.submit(self._median, partial(once, *pair)).result()
                found.append((size, seconds))
        return tuple(found)

    def _median(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_TIMES):
            begin = self.clock()
            work()
            seconds.append(self.clock() - begin)
        return max(statistics.median(seconds), 1e-9)


def _factor_and_basis(size: int) -> tuple[Tensor, Tensor]:
    """A factor (1, n, n) of a gradient with a falling spectrum, and a basis near its own."""
    generator = torch.Generator("cpu").manual_seed(size)
    scales = torch.linspace(1, 0.01, size, device="cpu")
    gradient = torch.randn(size, size, generator=generator, device="cpu") * scales
    factor = (gradient @ gradient.mT / size).unsqueeze(0)
    start = torch.eye(size, device="cpu").unsqueeze(0)
    return factor, orthogonal_iteration(factor, start, sort=True).basis
